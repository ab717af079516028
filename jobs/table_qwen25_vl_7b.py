"""Qwen2.5-VL-7B with a third, two ninths and a ninth of its visual tokens on ten benchmarks (arXiv 2605.28051, table 3).

    diffprune run table_qwen25_vl_7b --tiny      # the same code on a tiny random Qwen2.5-VL and a few rows of our own
    diffprune fetch gqa mmbench mmbench_cn mme pope scienceqa vqav2 textvqa seed vizwiz Qwen/Qwen2.5-VL-7B-Instruct
    diffprune run table_qwen25_vl_7b             # one GPU; resumes where it stopped

Methods are those of `_printed.py`. The trained ones, three scorer seeds each, and the calibrated ones are all from one recipe, and
looked for where it leaves them (others: see `table_llava15_7b.py`):

    diffprune run train_qwen25_vl_7b

A budget is the average over decoder layers; where the layers before a method's first cut alone see more, it is left out.
The paper removes 66.7, 77.8 and 88.9 % and has five of the ten benchmarks; it does not say by whose prompts. Protocol `llava`, with
the checkpoint's own chat template and pictures at their own size. TextVQA is asked without OCR tokens, as 84.8 suggests. The
encoder has no [CLS] token; methods that look at its attention look at what each token receives. MME is the total; flags as in
`table_llava15_7b.py`.
"""

from _printed import compared
from train_qwen25_vl_7b import job as training

from diffprune.job import Evaluation, Job

job = Job(
    name="table_qwen25_vl_7b",
    title="Qwen2.5-VL-7B: ten benchmarks at a third, two ninths and a ninth of the visual tokens",
    model="Qwen/Qwen2.5-VL-7B-Instruct",
    family="qwen2_5_vl",
    evaluate=Evaluation(
        benchmarks=(
            "gqa", "mmbench", "mmbench_cn", "mme(main='total')", "pope", "scienceqa", "vqav2", "textvqa(ocr=False)", "seed",
            "vizwiz",
        ),
        protocol="llava",
        batch=16,
        blind=True,
    ),
    baselines=compared(training),
    budgets=("Share(1/3)", "Share(2/9)", "Share(1/9)"),
    leave_out=True,
    workers=1,
    tiny={"budgets": ("Share(2/3)",), "train.budgets": ("Share(2/3)",)},
)  # fmt: skip
