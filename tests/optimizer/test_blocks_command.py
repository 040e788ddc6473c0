"""`python -m misa.blocks`."""

import json

import pytest
from tiny import llama

from misa import blocks


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    llama(2).config.to_json_file(path, use_diff=False)
    return str(path)


def printed(capsys, *arguments):
    status = blocks.main(list(arguments))
    return status, capsys.readouterr()


def test_table_lists_every_block_with_shape_and_share_and_then_the_rest(config, capsys):
    status, out = printed(capsys, config)
    lines = out.out.splitlines()
    assert status == 0
    assert len([line for line in lines if line.startswith("model.layers.")]) == 14
    total = sum(p.numel() for p in llama(2).parameters())
    row = next(line.split() for line in lines if "layers.1.mlp.down_proj" in line)
    assert row == ["model.layers.1.mlp.down_proj", "32", "x", "48", "1,536", f"{100 * 1536 / total:.3f}%"]
    assert "(embeddings)" in out.out
    assert f"14 blocks in 2 layers hold 15,360 of {total:,} trainable parameters" in lines[-1]


def test_json_is_the_same_in_numbers(config, capsys):
    status, out = printed(capsys, config, "--json", "--granularity", "layer", "--budget", "1")
    found = json.loads(out.out)
    assert status == 0
    assert [b["name"] for b in found["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert all(b["fits"] for b in found["blocks"])
    shares = sum(b["share"] for b in found["blocks"]) + sum(r["share"] for r in found["rest"].values())
    assert shares == pytest.approx(1)
    assert found["rest"]["head"]["names"] == ["lm_head.weight"]


def test_budget_marks_what_never_fits_and_says_what_would(config, capsys):
    _, out = printed(capsys, config, "--budget", "0.06")
    lines = out.out.splitlines()
    assert {"mlp" in line for line in lines if line.endswith("never fits")} == {True}
    enough = lines[-1].partition("needs ")[2].split()[1]
    _, out = printed(capsys, config, "--budget", enough)
    assert out.out.splitlines()[-1].endswith("every block fits")


def test_include_and_exclude_choose(config, capsys):
    _, out = printed(capsys, config, "--json", "--include", "*.self_attn.*", "lm_head", "--exclude", "*.k_proj")
    names = [b["name"] for b in json.loads(out.out)["blocks"]]
    assert len(names) == 7
    assert names[-1] == "lm_head"


def test_built_in_size_is_split_without_its_weights(capsys):
    assert all(p.is_meta for p in blocks.meta_model("1b").parameters())
    status, out = printed(capsys, "1b")
    assert status == 0
    assert "168 blocks in 24 layers" in out.out


def test_local_folder_of_another_kind_of_model_is_read(tmp_path, capsys):
    from transformers import ViTConfig

    ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48).save_pretrained(
        tmp_path
    )
    status, out = printed(capsys, str(tmp_path), "--granularity", "half")
    assert status == 0
    assert "4 blocks in 2 layers" in out.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--include", "*.q_prj"], "include: pattern '*.q_prj' matches nothing that can be a block; nearest:"),
        (["--budget", "2"], "budget=2.0: must lie in (0, 1]"),
    ],
)
def test_wrong_argument_exits_2_with_one_line(config, capsys, arguments, message):
    status, out = printed(capsys, config, *arguments)
    assert status == 2
    assert message in out.err
    assert len(out.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["nowhere", "owner/nowhere", "./nowhere"])
def test_missing_model_exits_2_with_one_line(capsys, name):
    status, out = printed(capsys, name)
    assert status == 2
    allowed = "allowed is a hub id, a local folder, a config.json, or one of 2m, "
    assert out.err.startswith(f"python -m misa.blocks: error: model {name!r} gives no configuration, {allowed}")
    assert len(out.err.splitlines()) == 1
