# `snakemake freeze`: make this run's tables the committed ones. It copies what is there, whatever is older or newer, and
# makes nothing.


rule freeze:
    log:
        f"{LOGS}/freeze.log",
    conda:
        "../envs/misa.yaml"
    params:
        files=lambda wildcards: finished(
            *(f"{OUT}/tables/{table}.csv" for table in FROZEN_TABLES),
            f"{OUT}/tables/MANIFEST.json",
        ),
        folder=FROZEN,
    message:
        "copying the tables into {params.folder}"
    shell:
        "mkdir -p {params.folder} && cp {params.files} {params.folder} > {log} 2>&1"


rule freeze_memory_grid:
    log:
        f"{LOGS}/freeze_memory_grid.log",
    conda:
        "../envs/misa.yaml"
    params:
        files=lambda wildcards: finished(
            *(f"{OUT}/memory_grid/{table}.csv" for table in GRID_TABLES),
            f"{OUT}/memory_grid/memory_grid.json",
        ),
        folder="paper_figures/data",
    message:
        "copying the memory grid into {params.folder}"
    shell:
        "mkdir -p {params.folder} && cp {params.files} {params.folder} > {log} 2>&1"
