# Scores of every model, memory of one training step, variance of the gradient, rate of convergence; then one set of tidy tables.


rule evaluate_pretrained:
    input:
        model=f"{OUT}/runs/{{run}}/model",
        result=f"{OUT}/runs/{{run}}/result.json",
        data=rules.corpus.output.validation,
    output:
        result=f"{OUT}/evaluations/{{run}}/result.json",
        harness=f"{OUT}/evaluations/{{run}}/lm_eval.json",
    log:
        f"{LOGS}/evaluations/{{run}}.log",
    wildcard_constraints:
        run=one_of(runs_of("pretrain")),
    conda:
        "../envs/misa.yaml"
    threads: THREADS
    resources:
        gpu=min(config["gpus"], 1),
    params:
        args=lookup("evaluate/pretrained", within=config),
        data=subpath(input.data, parent=True),
        folder=subpath(output.result, parent=True),
    message:
        "perplexity of {wildcards.run}"
    shell:
        "python -m misa.evaluate --offline --model_name_or_path {input.model} --data_dir {params.data} {params.args}"
        " --run {wildcards.run} --output_dir {params.folder} > {log} 2>&1"


rule evaluate_finetuned:
    input:
        model=lambda wildcards: (
            BASE_MODEL
            if wildcards.run in base_runs()
            else f"{OUT}/runs/{wildcards.run}/model"
        ),
        base=BASE_MODEL,
        data=lambda wildcards: (
            [] if data_of(wildcards.run) in MIXES else rules.family.output.test
        ),
    output:
        result=f"{OUT}/evaluations/{{run}}/result.json",
        harness=f"{OUT}/evaluations/{{run}}/lm_eval.json",
    log:
        f"{LOGS}/evaluations/{{run}}.log",
    wildcard_constraints:
        run=one_of([*base_runs(), *runs_of("finetune")]),
    conda:
        "../envs/misa.yaml"
    threads: THREADS
    resources:
        gpu=min(config["gpus"], 1),
    params:
        args=lambda wildcards: (
            MIXES[data_of(wildcards.run)]["evaluate"]
            if data_of(wildcards.run) in MIXES
            else config["evaluate"]["finetuned"]
        ),
        data=lambda wildcards: (
            '"$MISA_DATA_DIR"'
            if data_of(wildcards.run) in MIXES
            else f"{OUT}/data/family"
        ),
        content=lambda wildcards: (
            tests_digest(data_of(wildcards.run))
            if data_of(wildcards.run) in MIXES
            else "family"
        ),
        folder=subpath(output.result, parent=True),
    message:
        "scores of {wildcards.run}"
    shell:
        "python -m misa.evaluate --offline --model_name_or_path {input.model} --data_dir {params.data} {params.args}"
        " --run {wildcards.run} --output_dir {params.folder} > {log} 2>&1"


rule memory:
    input:
        model=BASE_MODEL,
    output:
        result=f"{OUT}/memory/result.json",
        table=f"{OUT}/memory/memory.csv",
    log:
        f"{LOGS}/memory.log",
    benchmark:
        f"{OUT}/benchmarks/memory.tsv"
    conda:
        "../envs/misa.yaml"
    threads: THREADS
    params:
        args=lookup("memory/args", within=config),
        folder=subpath(output.result, parent=True),
    message:
        "memory of one training step of each method"
    shell:
        "python -m misa.memory --model_name_or_path {input.model} {params.args} --output_dir {params.folder}"
        " > {log} 2>&1"


rule variance:
    input:
        models=expand(f"{OUT}/runs/{{run}}/model", run=config["variance"]["runs"]),
        snapshots=expand(
            f"{OUT}/runs/{{run}}/snapshots", run=config["variance"]["runs"]
        ),
        data=rules.corpus.output.train,
    output:
        result=f"{OUT}/variance/result.json",
        variance=f"{OUT}/variance/variance.csv",
        norms=f"{OUT}/variance/gradient_norms.csv",
        staleness=f"{OUT}/variance/staleness.csv",
    log:
        f"{LOGS}/variance.log",
    benchmark:
        f"{OUT}/benchmarks/variance.tsv"
    conda:
        "../envs/misa.yaml"
    threads: THREADS
    params:
        args=lookup("variance/args", within=config),
        data=subpath(input.data, parent=True),
        folder=subpath(output.result, parent=True),
    message:
        "variance of the gradient under each way of drawing blocks"
    shell:
        "python -m misa.dynamics variance --model {input.snapshots} {input.models} --dataset_path {params.data} {params.args}"
        " --output_dir {params.folder} > {log} 2>&1"


rule rate:
    input:
        corpus=rules.corpus.output.digest,
        tokenizer=rules.corpus.output.tokenizer,
    output:
        result=f"{OUT}/rate/result.json",
        table=f"{OUT}/rate/rate.csv",
    log:
        f"{LOGS}/rate.log",
    benchmark:
        f"{OUT}/benchmarks/rate.tsv"
    conda:
        "../envs/misa.yaml"
    threads: THREADS
    params:
        args=lookup("rate/args", within=config),
        data=subpath(input.corpus, parent=True),
        folder=subpath(output.result, parent=True),
    message:
        "rate of convergence of Algorithm 1"
    shell:
        "python -m misa.dynamics rate --dataset_path {params.data} {params.args} --output_dir {params.folder}"
        " > {log} 2>&1"


rule collect:
    input:
        runs=expand(f"{OUT}/runs/{{run}}/result.json", run=RUNS["run"]),
        curves=expand(f"{OUT}/runs/{{run}}/curves.csv", run=RUNS["run"]),
        scores=expand(
            f"{OUT}/evaluations/{{run}}/result.json", run=[*base_runs(), *RUNS["run"]]
        ),
        memory=rules.memory.output.result,
        memory_table=rules.memory.output.table,
        variance=rules.variance.output.result if config["variance"]["runs"] else [],
        rate=rules.rate.output.result,
        rate_table=rules.rate.output.table,
        variance_tables=(
            [
                rules.variance.output.variance,
                rules.variance.output.norms,
                rules.variance.output.staleness,
            ]
            if config["variance"]["runs"]
            else []
        ),
    output:
        tables=expand(f"{OUT}/tables/{{table}}.csv", table=ALL_TABLES),
        manifest=f"{OUT}/tables/MANIFEST.json",
    log:
        f"{LOGS}/collect.log",
    conda:
        "../envs/misa.yaml"
    params:
        folder=subpath(output.manifest, parent=True),
    message:
        "tidy tables from all result files"
    shell:
        "python -m misa.results collect {input.runs} {input.scores} {input.memory} {input.variance} {input.rate}"
        " --output_dir {params.folder} > {log} 2>&1"
