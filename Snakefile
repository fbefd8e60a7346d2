# The DAG: one rule a notebook, each a call of the strict runner. ./run_all.sh runs it, with the options that
# thesis_lib/pipeline.py adds. A notebook that does not exist has no rule; one with `variants` in the profile runs once
# per variant.
#
# What is made again: a run whose notebook, parameters or inputs changed. An edit in thesis_lib makes nothing stale by
# itself, or one comment would cost a night of distillation. Every result says which revision made it, and
# `./run_all.sh --forcerun attention_evaluation` (or --forceall) makes it again, with all that is made from it.
import os
import shlex
import sys
from functools import partial

from thesis_lib import paths, profiles

PROFILE = config.get("profile", "demo")
CONTENT = profiles.load(PROFILE)
JOBS = {"threads": 2, "mem_mb": 4000, "runtime": 240} | CONTENT.get("jobs", {})  # what one run may take (minutes)
NOTEBOOKS = {path.stem: path for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
RESULTS = paths.RESULTS / Path(PROFILE).stem
RESULTS = RESULTS.relative_to(paths.ROOT) if RESULTS.is_relative_to(paths.ROOT) else RESULTS

# What a notebook reads of other notebooks' results; a name may end in one variant. The figures read all of them.
READS = {
    "02_attention_evaluation": ["01_data_preparation"],
    "03_efficiency_analysis": [],
    "04_distillation": [
        "01_data_preparation",
        "02_attention_evaluation-mha",  # the teacher
        "02_attention_evaluation{variant}",  # the same mixer before
    ],
    "05_attention_transfer": ["01_data_preparation"],
    "06_adaptive_tokens": ["01_data_preparation", "02_attention_evaluation-mha"],  # the teacher
    "07_image_classification": ["01_data_preparation"],
    "08_semantic_correspondence": ["01_data_preparation", "02_attention_evaluation", "04_distillation"],
    "10_proposed_model": ["01_data_preparation", "02_attention_evaluation", "04_distillation"],
    "09_thesis_figures": [name for name in NOTEBOOKS if name != "09_thesis_figures"],
}
# Of 01 these two need no more than the synthetic sets: with published ones they wait for nobody.
if not any((CONTENT.get("01_data_preparation") or {}).get(name, True) for name in profiles.SYNTHETIC):
    READS |= {"05_attention_transfer": [], "07_image_classification": []}
# Rows of other machines, which the figures show beside these.
MEASURED = [os.path.relpath(path, paths.ROOT) for path in sorted(paths.MEASURED.glob("efficiency-*.parquet"))]
# These write a table of single triplets beside their rows.
TRIPLETS = ("02_attention_evaluation", "04_distillation", "10_proposed_model")
# Others wait for 02 and 04; of the rest the longest start first, so that no core is left with a long one at the end.
PRIORITY = {"05_attention_transfer": 4, "06_adaptive_tokens": 3, "04_distillation": 2, "02_attention_evaluation": 1}
# Where a GPU is shared, in this order: what finds missing data, the core study, and the longest last.
GPU_ORDER = "01 02 04 10 06 07 08 03 05".split()
ALONE = ("03_efficiency_analysis", "10_proposed_model")  # these time things
LOCAL_CORES = workflow.resource_settings.cores  # None on a cluster, where profiles/slurm makes them exclusive


def variants(notebook):
    """The runs of a notebook: what its name adds to the notebook's, and its parameters on the command line."""
    return {
        run.removeprefix(notebook): [word for name, value in given.items() for word in ("-p", name, str(value))]
        for run, given in profiles.runs(CONTENT, notebook).items()
    }


def results(notebook):
    return [f"{RESULTS}/{notebook}{variant}.parquet" for variant in variants(notebook)] if notebook in NOTEBOOKS else []


def reads(notebook, wildcards):
    names = [name.format(variant=wildcards.variant) for name in READS.get(notebook, [])]
    if notebook == "02_attention_evaluation" and wildcards.variant != "-mha":
        names.append("02_attention_evaluation-mha")  # MHA, tuned, is the teacher: other mixers are tried with its adapter
    whole = {name: results(name.partition("-")[0]) for name in names}
    return [path for name, paths in whole.items() for path in paths if "-" not in name or f"/{name}." in path]


def on_gpu(notebook):
    return (CONTENT.get(notebook) or {}).get("device", "cpu") != "cpu"


def priority(notebook):
    if any(map(on_gpu, NOTEBOOKS)):
        return len(GPU_ORDER) - GPU_ORDER.index(notebook[:2]) if notebook[:2] in GPU_ORDER else 0
    return PRIORITY.get(notebook, 0)


def arguments(notebook, wildcards):
    return shlex.join(variants(notebook)[wildcards.variant])


wildcard_constraints:
    variant=r"(-[^/.]+)?",


rule all:
    default_target: True
    input:
        [path for notebook in NOTEBOOKS for path in results(notebook)],


for notebook, path in NOTEBOOKS.items():
    names = [notebook + "{variant}"] + [notebook + "{variant}.triplets"] * (notebook in TRIPLETS)

    rule:
        name:
            notebook[3:]
        input:
            partial(reads, notebook),
            MEASURED if notebook == "09_thesis_figures" else [],
            notebook=os.path.relpath(path, paths.ROOT),
        output:
            [f"{RESULTS}/{name}.parquet" for name in names],
        params:
            arguments=partial(arguments, notebook),
            # Not in the command, which reads the profile itself: a run whose section changed is stale.
            section=repr(CONTENT.get(notebook)),
            results=" ".join(f"--results {name}" for name in names),
            gpu="--gpu" if on_gpu(notebook) else "",
        priority: priority(notebook)
        threads: LOCAL_CORES or JOBS["threads"] if notebook in ALONE else JOBS["threads"]
        resources:
            mem_mb=JOBS["mem_mb"],
            runtime=JOBS["runtime"],
            gpu=int(on_gpu(notebook)),
        shell:
            f"{shlex.quote(sys.executable)} -m thesis_lib.execute {{input.notebook:q}} "
            f"--profile {shlex.quote(PROFILE)} {{params.arguments}} {{params.results}} {{params.gpu}}"
