# `snakemake freeze`: make this run's tables the committed ones. In no other target's chain.


rule freeze:
    input:
        tables=rules.collect.output.tables,
        manifest=rules.collect.output.manifest,
    output:
        tables=expand("paper_figures/data/{table}.csv", table=ALL_TABLES),
        manifest="paper_figures/data/MANIFEST.json",
    log:
        f"{LOGS}/freeze.log",
    conda:
        "../envs/misa.yaml"
    message:
        "copying the tables into paper_figures/data"
    script:
        "../scripts/freeze.py"
