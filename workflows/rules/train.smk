# One row of the sheet is one run is one folder. Checkpoints lie in a folder that no rule declares, so that a run that
# was killed goes on from there instead of losing them together with its outputs.


rule pretrain:
    input:
        corpus=rules.corpus.output.digest,
        train=rules.corpus.output.train,
        validation=rules.corpus.output.validation,
    output:
        result=f"{OUT}/runs/{{run}}/result.json",
        curves=f"{OUT}/runs/{{run}}/curves.csv",
        model=directory(f"{OUT}/runs/{{run}}/model"),
        snapshots=directory(f"{OUT}/runs/{{run}}/snapshots"),
    log:
        f"{LOGS}/runs/{{run}}.log",
    benchmark:
        f"{OUT}/benchmarks/runs/{{run}}.tsv"
    wildcard_constraints:
        run=one_of(runs_of("pretrain")),
    conda:
        "../envs/misa.yaml"
    threads: THREADS
    resources:
        gpu=config["gpus"],
    params:
        launch=LAUNCH,
        args=lookup(query="run == '{run}'", within=RUNS, cols="args"),
        shared=lookup(query="run == '{run}'", within=RUNS, cols="shared"),
        data=subpath(input.corpus, parent=True),
        # Only runs that the variance is measured along write any.
        snapshots=lambda wildcards: (
            config["variance"]["snapshot_steps"]
            if wildcards.run in config["variance"]["runs"]
            else "none"
        ),
        folder=subpath(output.result, parent=True),
        scratch=f"{SCRATCH}/{{run}}",
    message:
        "pre-training {wildcards.run} (progress: {log})"
    shell:
        "{params.launch} misa.pretrain --dataset_path {params.data} {params.shared} {params.args} --run {wildcards.run}"
        " --snapshot_steps {params.snapshots}"
        " --output_dir {params.folder} --checkpoint_dir {params.scratch} --overwrite_output_dir > {log} 2>&1"


rule finetune:
    input:
        model=BASE_MODEL,
        train=lambda wildcards: f"{OUT}/data/{data_of(wildcards.run)}/train.jsonl",
        digest=lambda wildcards: f"{OUT}/data/{data_of(wildcards.run)}/digest.json",
    output:
        result=f"{OUT}/runs/{{run}}/result.json",
        curves=f"{OUT}/runs/{{run}}/curves.csv",
        model=directory(f"{OUT}/runs/{{run}}/model"),
    log:
        f"{LOGS}/runs/{{run}}.log",
    benchmark:
        f"{OUT}/benchmarks/runs/{{run}}.tsv"
    wildcard_constraints:
        run=one_of(runs_of("finetune")),
    conda:
        "../envs/misa.yaml"
    threads: THREADS
    resources:
        gpu=config["gpus"],
    params:
        launch=LAUNCH,
        args=lookup(query="run == '{run}'", within=RUNS, cols="args"),
        shared=lookup(query="run == '{run}'", within=RUNS, cols="shared"),
        data=subpath(input.digest, parent=True),
        folder=subpath(output.result, parent=True),
        scratch=f"{SCRATCH}/{{run}}",
    message:
        "fine-tuning {wildcards.run} (progress: {log})"
    shell:
        "{params.launch} misa.train --model_name_or_path {input.model} --dataset_path {params.data} {params.shared}"
        " {params.args} --run {wildcards.run} --output_dir {params.folder} --checkpoint_dir {params.scratch} --overwrite_output_dir"
        " > {log} 2>&1"
