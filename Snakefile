# Inputs -> training -> evaluation and measurement -> tidy tables -> figures, score table, report.
#
#   snakemake --cores all                                  the chain at laptop scale, into results/laptop
#   snakemake --cores all --config results=cached          figures from paper_figures/data; trains nothing
#   snakemake --cores all --config scale=workstation       another scale: laptop, workstation, paper
#   snakemake --cores all freeze                           copy the fresh tables into paper_figures/data
from snakemake.utils import min_version

min_version("9.27")


report: "workflows/report/workflow.rst"


include: "workflows/rules/common.smk"
include: "workflows/rules/inputs.smk"
include: "workflows/rules/train.smk"
include: "workflows/rules/measure.smk"
include: "workflows/rules/figures.smk"


if not CACHED:

    include: "workflows/rules/freeze.smk"


rule all:
    default_target: True
    input:
        expand(
            f"{FIGURES}/{{figure}}.{{ending}}",
            figure=FIGURE_TABLES,
            ending=["pdf", "png"],
        ),
        rules.score_tables.output,


onstart:
    hold_lock()
    end_orphans()


onsuccess:
    write_report(rules.all.input)
