"""DiffPrune scorers for Qwen2.5-VL-7B, as the paper trains them (arXiv 2605.28051), and its trained rivals on the same data.

    diffprune run train_qwen25_vl_7b --dry-run       # memory and hours, from the numbers below; needs no download
    diffprune run train_qwen25_vl_7b --tiny          # the same code on a tiny random Qwen2.5-VL, in seconds
    diffprune run train_qwen25_vl_7b --scorer diffprune      # one GPU; resumes where it stopped
    diffprune run train_qwen25_vl_7b                 # all methods that `table_qwen25_vl_7b.py` compares

Data, optimizer, schedule, our choices and the rivals are those of `train_llava15_7b.py`: the paper reuses them unchanged. What
differs: the number of visual tokens follows the image's size, so budgets are shares: 66.7, 77.8 and 88.9 % removed. The paper
prunes before the language model without saying where; we score what enters the 2 x 2 merger, four patches side by side per token
(5,120 wide, read by the scorer through a matrix to 1,024), so that only survivors are merged. The denoiser works at that width
and holds most of the trained parameters; it is gone after training.
"""

from _printed import CALIBRATED, SETTINGS, TRAINED

from diffprune.job import Job, Recipe
from diffprune.train.estimate import Assumed

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
BUDGETS = ("Share(1/3)", "Share(2/9)", "Share(1/9)")

job = Job(
    name="train_qwen25_vl_7b",
    title="DiffPrune for Qwen2.5-VL-7B",
    model=MODEL,
    family="qwen2_5_vl",
    config={
        "model_type": "qwen2_5_vl",
        "text_config": {
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4,
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    assumed=Assumed(visual=240),  # an ImageNet picture of about 470 x 390 px, 28 x 28 px per token
    train=Recipe(
        model=MODEL,
        pruners=(*TRAINED, *CALIBRATED),
        seeds=(0, 1, 2),
        data="parquet('data/imagenet-1k-vl-enriched', answer='caption_enriched', prompt='Describe the image.')",
        steps=4000,
        ease_share=0.0,  # the paper draws no larger budgets first
        images=32,
        questions=1,
        questions_alone=1,
        learning_rate=2e-4,
        warmup_share=0.03,
        weight_decay=0.01,
        clip=1.0,
        temperature_start=2.0,
        temperature_end=0.1,
        anneal_share=0.5,
        budgets=BUDGETS,
        calibration_images=64,
        validation_images=32,
        dtype="bfloat16",
        micro_images=8,
        checkpointing=True,
        checkpoint_every=250,
        validate_every=250,
        grad_cosine_every=0,
        workers=1,
        methods=SETTINGS,
    ),
    baselines=("unpruned",),
    budgets=BUDGETS,
    report=False,
    tiny={"train.budgets": ("Share(2/3)", "Share(1/3)")},
)  # fmt: skip
