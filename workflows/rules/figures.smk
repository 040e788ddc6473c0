# Figures and the score table, from the cached tables or from fresh ones. Nothing here trains.


rule figure:
    input:
        table=lambda wildcards: table_of(wildcards.figure),
    output:
        pdf=f"{FIGURES}/{{figure}}.pdf",
        png=report(
            f"{FIGURES}/{{figure}}.png",
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}", "scale": SCALE},
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
    output:
        scores=report(
            f"{SCORES}/scores.md",
            caption="../report/score_tables.rst",
            category="Tables",
            labels={"table": "fine-tuning", "scale": SCALE},
        ),
        pretraining=report(
            f"{SCORES}/pretraining.md",
            caption="../report/score_tables.rst",
            category="Tables",
            labels={"table": "pre-training", "scale": SCALE},
        ),
        latex=expand(f"{SCORES}/{{table}}.tex", table=["scores", "pretraining"]),
    log:
        f"{LOGS}/score_tables.log",
    conda:
        "../envs/misa.yaml"
    params:
        tables=subpath(input.scores, parent=True),
        folder=subpath(output.scores, parent=True),
    message:
        "score tables in Markdown and LaTeX"
    shell:
        "python -m misa.results tables --tables {params.tables} --output_dir {params.folder} > {log} 2>&1"


rule study_table:
    input:
        table=lambda wildcards: study_table_of(wildcards.table),
    output:
        markdown=report(
            f"{SCORES}/{{table}}.md",
            caption="../report/study_table.rst",
            category="Tables",
            labels={"table": "{table}", "scale": SCALE},
        ),
        latex=f"{SCORES}/{{table}}.tex",
    log:
        f"{LOGS}/{{table}}.log",
    wildcard_constraints:
        table=one_of(STUDY_TABLES),
    conda:
        "../envs/misa.yaml"
    params:
        folder=subpath(output.markdown, parent=True),
    message:
        "table {wildcards.table} from {input.table}"
    shell:
        "python -m misa.results {wildcards.table} --table {input.table} --output_dir {params.folder} > {log} 2>&1"
