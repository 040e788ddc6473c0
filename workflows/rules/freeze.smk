# `snakemake freeze`: make this run's tables the committed ones. In no other target's chain.


rule freeze:
    input:
        tables=rules.collect.output.tables,
        manifest=rules.collect.output.manifest,
    output:
        tables=expand(f"{FROZEN}/{{table}}.csv", table=ALL_TABLES),
        manifest=f"{FROZEN}/MANIFEST.json",
    log:
        f"{LOGS}/freeze.log",
    conda:
        "../envs/misa.yaml"
    message:
        f"copying the tables into {FROZEN}"
    script:
        "../scripts/freeze.py"
