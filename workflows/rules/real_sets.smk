# The files of real sets in data_dir, by their content.
from functools import cache

from misa.data.records import SUFFIXES, files_digest
from misa.data.sources import find_instructions


def data_files():
    """All data files in data_dir, in which a known set is looked for at most two folders down."""
    return sorted(
        path
        for depth in ("*", "*/*", "*/*/*")
        for path in Path(DATA_DIR).glob(depth)
        if path.suffix in SUFFIXES
    )


def plain(text):
    """Names of sets are compared without case and without - and _."""
    return re.sub("[-_]", "", text).lower()


def test_files(name):
    """Files in data_dir with the test items of a set: NAME_test.json, NAME/test.json and the like; maybe none."""
    known = [{key, *entry.others} for key, entry in KNOWN.items()]
    names = next((names for names in known if name in names), {name})
    wanted = set(map(plain, names))
    return [
        path
        for path in data_files()
        if path.stem.endswith("test")
        and plain(path.stem.removesuffix("test") or path.parent.name) in wanted
    ]


# The content of real sets is a parameter of what is made of them, and neither their folder nor the age of their files is:
# the same sets in another place make nothing anew, and changed ones do.
@cache
def mix_digest(mix):
    """Digest of the files in data_dir that a mix is made of, and of the tests that are left out of it."""
    try:
        files = [
            path
            for name in MIXES[mix]["sets"]
            for path in (*find_instructions(name, DATA_DIR).train, *test_files(name))
        ]
    except ValueError as error:
        raise WorkflowError(f"mixes.{mix}.sets: {error}") from None
    return files_digest(files)


@cache
def tests_digest(mix):
    """Digest of the files in data_dir that models of a mix are scored on.

    Tasks that are not simply `misa_` and the name of a set, groups and the harness's own, may read any file.
    """
    tasks = re.findall(r"--tasks[ =](\S+)", MIXES[mix]["evaluate"])[-1:]
    files = [
        path
        for task in ",".join(tasks).split(",")
        for path in test_files(task.removeprefix("misa_")) or data_files()
    ]
    return files_digest(dict.fromkeys(files))
