# Memory of a full-size model, on fake tensors: `snakemake memory_grid`. It depends on no run and takes minutes, so it has
# a chain of its own; scales that set memory_grid.in_all have its figures among theirs.


rule memory_grid_part:
    output:
        part=f"{OUT}/memory_grid/parts/{{part}}.json",
    log:
        f"{LOGS}/memory_grid-{{part}}.log",
    benchmark:
        f"{OUT}/benchmarks/memory_grid-{{part}}.tsv"
    wildcard_constraints:
        part=one_of(config["memory_grid"]["parts"]),
    conda:
        "../envs/misa.yaml"
    params:
        model=lookup("memory_grid/model", within=config),
    message:
        "memory of {params.model}: {wildcards.part}"
    shell:
        "OMP_NUM_THREADS=1 python -m misa.memory.grid part --part {wildcards.part} --model {params.model}"
        " --output {output.part} > {log} 2>&1"


rule memory_grid_tables:
    input:
        parts=expand(
            f"{OUT}/memory_grid/parts/{{part}}.json",
            part=config["memory_grid"]["parts"],
        ),
    output:
        tables=expand(f"{OUT}/memory_grid/{{table}}.csv", table=GRID_TABLES),
        origin=f"{OUT}/memory_grid/memory_grid.json",
    log:
        f"{LOGS}/memory_grid.log",
    conda:
        "../envs/misa.yaml"
    params:
        folder=subpath(output.origin, parent=True),
    message:
        "tables of the memory grid"
    shell:
        "python -m misa.memory.grid join {input.parts} --output_dir {params.folder} > {log} 2>&1"


rule memory_grid:
    input:
        rules.memory_grid_tables.output,
        expand(
            f"{FIGURES}/{{figure}}.{{ending}}",
            figure=GRID_FIGURES,
            ending=["pdf", "png"],
        ),
