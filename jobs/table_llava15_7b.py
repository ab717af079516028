"""LLaVA-1.5-7B at 192, 128 and 64 of 576 visual tokens on ten benchmarks: the field's main table (arXiv 2605.28051, table 1).

    diffprune run table_llava15_7b --tiny        # the same code on a tiny random LLaVA and a few rows of our own
    diffprune fetch gqa mmbench mmbench_cn mme pope scienceqa vqav2 textvqa seed vizwiz llava-hf/llava-1.5-7b-hf
    diffprune run table_llava15_7b               # one GPU; resumes where it stopped

The learned methods are three scorer seeds each, all from one recipe:

    diffprune run train_llava15_7b --set 'train.pruners=["diffprune", "gumbel_topk", "gumbel_keepdrop"]'

Their weights are looked for where that command leaves them. Others are named by folder or by repository of the Hub, with the rules
to be asked beside them:

    diffprune run table_llava15_7b --pruner random --pruner "diffprune(weights='owner/scorer')"

Protocol `llava`, as LLaVA's own scripts: pictures padded to a square, the conversation with the system sentence, OCR tokens in
TextVQA's prompt. MME is the total, as in pruning tables. MMBench, POPE, VQAv2 and VizWiz are flagged `substitute`: what is
published with answers is not what the papers' servers grade. VQAv2 is four fifths of all questions; `--benchmark` chooses others
and `--limit` draws some of each, which the page then says.
"""

from diffprune.job import Evaluation, Job

SCORERS = "runs/train_llava15_7b/scorers"
LEARNED = ("diffprune", "gumbel_topk", "gumbel_keepdrop")
SEEDS = (0, 1, 2)

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
    baselines=(
        "unpruned",
        *(f"random(seed={seed})" for seed in SEEDS),
        "grid",
        "attention",
        *(f"{method}(weights='{SCORERS}/{method}-{seed}')" for method in LEARNED for seed in SEEDS),
    ),
    budgets=("Keep(192)", "Keep(128)", "Keep(64)"),
    workers=1,
)  # fmt: skip
