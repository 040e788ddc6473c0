# Inputs -> training -> evaluation and measurement -> tidy tables -> figures, score table, report.
#
#   snakemake --cores all                                  the chain at laptop scale, into results/laptop
#   snakemake --cores all --config results=cached          figures from paper_figures/data; trains nothing
#   snakemake --cores all --config scale=workstation       another scale: laptop, workstation, paper
#   snakemake --cores all --config scale=ablation          one question: ablation, tune (learning rates), evidence
#   snakemake --cores all freeze                           copy the fresh tables into paper_figures/data
#   snakemake --cores all memory_grid                      memory of a full-size model, on fake tensors
#   snakemake --cores all freeze_memory_grid               copy its tables into paper_figures/data
from snakemake.utils import min_version

min_version("9.27")


report: "workflows/report/workflow.rst"


include: "workflows/rules/common.smk"
include: "workflows/rules/real_sets.smk"
include: "workflows/rules/inputs.smk"
include: "workflows/rules/train.smk"
include: "workflows/rules/measure.smk"
include: "workflows/rules/figures.smk"
include: "workflows/rules/hooks.smk"


if not CACHED:

    include: "workflows/rules/memory_grid.smk"
    include: "workflows/rules/freeze.smk"


rule all:
    default_target: True
    input:
        expand(
            f"{FIGURES}/{{figure}}.{{ending}}",
            figure=DRAWN,
            ending=["pdf", "png"],
        ),
        rules.score_tables.output,
        expand(f"{SCORES}/{{table}}.{{ending}}", table=WRITTEN, ending=["md", "tex"]),
        rules.report_pages.output,
        expand(f"{PAGES}/{{table}}.html", table=WRITTEN),
        [rules.benchmark_tables.output, rules.scales_table.output] if CACHED else [],


onstart:
    hold_lock()
    end_orphans()
    check_frozen()
    name_left_out()


onsuccess:
    write_report(rules.all.input)
