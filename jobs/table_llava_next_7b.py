"""LLaVA-NeXT-7B at 640, 320 and 160 of 2,880 visual tokens on ten benchmarks (arXiv 2605.28051, table 2, which has 320 only).

    diffprune run table_llava_next_7b --tiny     # the same code on a tiny random LLaVA-NeXT and a few rows of our own
    diffprune fetch gqa mmbench mmbench_cn mme pope scienceqa vqav2 textvqa seed vizwiz llava-hf/llava-v1.6-vicuna-7b-hf
    diffprune run table_llava_next_7b            # one GPU; resumes where it stopped

Methods are those of `_printed.py`. The trained ones, three scorer seeds each, and the calibrated ones are all from one recipe, and
looked for where it leaves them (others: see `table_llava15_7b.py`):

    diffprune run train_llava_next_7b

A budget is the average over decoder layers. That leaves PyramidDrop out, whose first cut is after a quarter of them: 720 tokens
alone, more than any budget here. FastV, DART, SparseVLM and Dynamic-LLaVA cannot come down to 160, nor BTP; these are left out.

Protocol `llava`, with the checkpoint's own chat template and its tiles. TextVQA is asked without OCR tokens: the published 64.9 is.
A budget is one count for all tiles of a picture; newline tokens are not scored, stay while their line has a token, and are counted
apart. Pictures of another shape than 1:1 have fewer than 2,880 tokens, and keep the same count. MME is the total; flags as in
`table_llava15_7b.py`.
"""

from _printed import compared
from train_llava_next_7b import job as training

from diffprune.job import Evaluation, Job

job = Job(
    name="table_llava_next_7b",
    title="LLaVA-NeXT-7B: ten benchmarks at 640, 320 and 160 of 2,880 visual tokens",
    model="llava-hf/llava-v1.6-vicuna-7b-hf",
    family="llava_next",
    evaluate=Evaluation(
        benchmarks=(
            "gqa", "mmbench", "mmbench_cn", "mme(main='total')", "pope", "scienceqa", "vqav2", "textvqa(ocr=False)", "seed",
            "vizwiz",
        ),
        protocol="llava",
        batch=8,
        blind=True,
    ),
    baselines=compared(training, without=("pyramiddrop",)),
    budgets=("Keep(640)", "Keep(320)", "Keep(160)"),
    leave_out=True,
    workers=1,
    tiny={"budgets": ("Share(2/3)",), "train.budgets": ("Share(2/3)",)},
)  # fmt: skip
