"""LLaVA-1.5-7B at 192, 128 and 64 of 576 visual tokens on ten benchmarks: the field's main table (arXiv 2605.28051, table 1).

    diffprune run table_llava15_7b --tiny        # the same code on a tiny random LLaVA and a few rows of our own
    diffprune fetch gqa mmbench mmbench_cn mme pope scienceqa vqav2 textvqa seed vizwiz llava-hf/llava-1.5-7b-hf
    diffprune run table_llava15_7b               # one GPU; resumes where it stopped

Methods are those of `_printed.py`: what papers print for these models as far as we have it. The trained ones, three scorer seeds
each, and the calibrated ones are all from one recipe, and their weights are looked for where it leaves them:

    diffprune run train_llava15_7b

Others are named by folder or by repository of the Hub, with the rules to be asked beside them:

    diffprune run table_llava15_7b --pruner random --pruner "diffprune(weights='owner/scorer')"

A budget is the average over decoder layers, so methods that cut inside the decoder keep less behind their cuts: FastV with 64 keeps
30 after two full layers, where tables that print a FastV with 64 often mean 64 there, an average of 96. What the layers before a
first cut see alone is 144 of PyramidDrop and 72 of ATP-LLaVA: smaller budgets are left out for these.

Protocol `llava`, as LLaVA's own scripts: pictures padded to a square, the conversation with the system sentence, OCR tokens in
TextVQA's prompt. MME is the total, as in pruning tables. MMBench, POPE, VQAv2 and VizWiz are flagged `substitute`: what is
published with answers is not what the papers' servers grade. VQAv2 is four fifths of all questions; `--benchmark` chooses others
and `--limit` draws some of each, which the page then says.
"""

from _printed import compared
from train_llava15_7b import job as training

from diffprune.job import Evaluation, Job

job = Job(
    name="table_llava15_7b",
    title="LLaVA-1.5-7B: ten benchmarks at 192, 128 and 64 of 576 visual tokens",
    model="llava-hf/llava-1.5-7b-hf(frame='vicuna_v1', image_mode='pad')",
    family="llava",
    evaluate=Evaluation(
        benchmarks=(
            "gqa", "mmbench", "mmbench_cn", "mme(main='total')", "pope", "scienceqa", "vqav2", "textvqa", "seed", "vizwiz",
        ),
        protocol="llava",
        batch=16,
        blind=True,
    ),
    baselines=compared(training),
    budgets=("Keep(192)", "Keep(128)", "Keep(64)"),
    leave_out=True,
    workers=1,
    tiny={"budgets": ("Share(2/3)",), "train.budgets": ("Share(2/3)",)},
)  # fmt: skip
