# Figures and the score table, from the cached tables or from fresh ones. Nothing here trains. The code that draws and lays
# out is among the inputs, since all this takes seconds.
PACKAGE = Path(workflow.basedir, "misa")
CODE = sorted(
    [
        *PACKAGE.glob("figures/*.py"),
        *PACKAGE.glob("results/*.*"),
        PACKAGE / "dynamics" / "rate.py",
    ]
)
# Scores and peaks that were measured beside the study, for the table of published numbers.
MEASURED = sorted(
    [*Path(TABLES).glob("benchmarks/*.csv"), *Path(TABLES).glob("published/*.csv")]
)


rule figure:
    input:
        table=lambda wildcards: table_of(wildcards.figure),
        code=CODE,
    output:
        pdf=f"{FIGURES}/{{figure}}.pdf",
        png=report(
            f"{FIGURES}/{{figure}}.png",
            caption="../report/figure.rst",
            category=lambda wildcards: claim_of(wildcards.figure),
            labels={"figure": "{figure}", "scale": SHOWN},
        ),
    log:
        f"{LOGS}/figure-{{figure}}.log",
    wildcard_constraints:
        figure=one_of(FIGURE_TABLES),
    conda:
        "../envs/misa.yaml"
    params:
        stem=f"{FIGURES}/{{figure}}",
    message:
        "figure {wildcards.figure} from {input.table}"
    shell:
        "python -m misa.figures {wildcards.figure} --table {input.table} --output {params.stem} > {log} 2>&1"


rule score_tables:
    input:
        scores=f"{TABLES}/scores.csv",
        runs=f"{TABLES}/runs.csv",
        settings=f"{TABLES}/settings.csv",
        memory=f"{GRID}/memory_grid.csv" if GRID else [],
        measured=MEASURED,
        code=CODE,
    output:
        scores=f"{SCORES}/scores.md",
        others=expand(
            f"{SCORES}/{{table}}.md",
            table=["overview", "pretraining", "paired", "published"],
        ),
        latex=expand(
            f"{SCORES}/{{table}}.tex",
            table=["overview", "scores", "pretraining", "paired", "published"],
        ),
    log:
        f"{LOGS}/score_tables.log",
    conda:
        "../envs/misa.yaml"
    params:
        tables=subpath(input.scores, parent=True),
        grid=f"--memory_grid {GRID}" if GRID else "",
        folder=subpath(output.scores, parent=True),
    message:
        "overview, scores, paired differences and published numbers in Markdown and LaTeX"
    shell:
        "python -m misa.results tables --tables {params.tables} {params.grid} --output_dir {params.folder} > {log} 2>&1"


rule study_table:
    input:
        table=lambda wildcards: settings_of(wildcards.table),
        code=CODE,
    output:
        markdown=f"{SCORES}/{{table}}.md",
        latex=f"{SCORES}/{{table}}.tex",
        page=report(
            f"{PAGES}/{{table}}.html",
            caption="../report/study_table.rst",
            category="Tables",
            labels={"table": "{table}", "scale": SHOWN},
        ),
    log:
        f"{LOGS}/{{table}}.log",
    wildcard_constraints:
        table=one_of(STUDY_TABLES),
    conda:
        "../envs/misa.yaml"
    params:
        folder=subpath(output.markdown, parent=True),
        pages=subpath(output.page, parent=True),
    message:
        "table {wildcards.table} from {input.table}"
    shell:
        "python -m misa.results {wildcards.table} --table {input.table} --output_dir {params.folder}"
        " --page_dir {params.pages} > {log} 2>&1"


rule report_pages:
    input:
        scores=f"{TABLES}/scores.csv",
        runs=f"{TABLES}/runs.csv",
        settings=f"{TABLES}/settings.csv",
        manifest=f"{TABLES}/MANIFEST.json",
        # Of the studies of one question, which the report shows, too.
        manifests=sorted(Path(TABLES).glob("*/MANIFEST.json")) if CACHED else [],
        memory=([f"{GRID}/memory_grid.csv", f"{GRID}/memory_grid.json"] if GRID else []),
        measured=MEASURED,
        code=CODE,
    output:
        overview=report(
            f"{PAGES}/overview.html",
            caption="../report/overview.rst",
            category="Tables",
            labels={"table": "all methods at a glance", "scale": SHOWN},
        ),
        scores=report(
            f"{PAGES}/scores.html",
            caption="../report/tables.rst",
            category="Tables",
            labels={"table": "fine-tuning", "scale": SHOWN},
        ),
        pretraining=report(
            f"{PAGES}/pretraining.html",
            caption="../report/tables.rst",
            category="Tables",
            labels={"table": "pre-training", "scale": SHOWN},
        ),
        paired=report(
            f"{PAGES}/paired.html",
            caption="../report/paired.rst",
            category="Tables",
            labels={"table": "paired differences", "scale": SHOWN},
        ),
        published=report(
            f"{PAGES}/published.html",
            caption="../report/published.rst",
            category="Tables",
            labels={"table": "published numbers", "scale": SHOWN},
        ),
        runs=report(
            f"{PAGES}/runs.html",
            caption="../report/runs.rst",
            category="Runs",
            labels={"table": "code, machine and time of each run", "scale": SHOWN},
        ),
    log:
        f"{LOGS}/report_pages.log",
    conda:
        "../envs/misa.yaml"
    params:
        tables=subpath(input.scores, parent=True),
        grid=f"--memory_grid {GRID}" if GRID else "",
        folder=subpath(output.scores, parent=True),
    message:
        "tables of the report"
    shell:
        "python -m misa.results pages --tables {params.tables} {params.grid} --output_dir {params.folder} > {log} 2>&1"


if CACHED:

    # Scores on the public test sets, which the chain does not have.
    rule benchmark_tables:
        input:
            scores=f"{TABLES}/benchmarks/scores.csv",
            measured=MEASURED,
            code=CODE,
        output:
            table=f"{SCORES}/benchmarks.md",
            latex=f"{SCORES}/benchmarks.tex",
        log:
            f"{LOGS}/benchmark_tables.log",
        conda:
            "../envs/misa.yaml"
        params:
            tables=subpath(input.scores, parent=True),
            folder=subpath(output.table, parent=True),
        message:
            "table of the paper's benchmarks in Markdown and LaTeX"
        shell:
            "python -m misa.results benchmarks --tables {params.tables} --output_dir {params.folder} > {log} 2>&1"

    # What each scale takes, as far as it was measured.
    rule scales_table:
        input:
            configs=sorted(Path(workflow.basedir, "workflows", "config").glob("*.*")),
            runs=sorted(Path(TABLES).rglob("runs.csv")),
            times=f"{TABLES}/timings.json",
            code=CODE,
        output:
            table=f"{SCORES}/scales.md",
            latex=f"{SCORES}/scales.tex",
        log:
            f"{LOGS}/scales_table.log",
        conda:
            "../envs/misa.yaml"
        params:
            configs=str(Path(workflow.basedir, "workflows", "config")),
            tables=TABLES,
            folder=subpath(output.table, parent=True),
        message:
            "table of what each scale takes in Markdown and LaTeX"
        shell:
            "python -m misa.results scales --configs {params.configs} --tables {params.tables}"
            " --output_dir {params.folder} > {log} 2>&1"
