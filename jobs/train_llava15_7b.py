"""DiffPrune scorers for LLaVA-1.5-7B, as the paper trains them (arXiv 2605.28051), and its trained rivals on the same data.

    diffprune run train_llava15_7b --dry-run     # memory and hours, from the numbers below; needs no download
    diffprune run train_llava15_7b --tiny        # the same code on a tiny random LLaVA, in seconds
    diffprune run train_llava15_7b --scorer diffprune    # one GPU; resumes where it stopped
    diffprune run train_llava15_7b               # all methods that `table_llava15_7b.py` compares, eight times as long

Data: captions of ImageNet-1K-VL-Enriched, whose training split is expected below data/ (1.28 M images, of which a run reads a
random tenth, each once):

    hf download visual-layer/imagenet-1k-vl-enriched --repo-type dataset --include "data/train-*" \\
        --local-dir data/imagenet-1k-vl-enriched

The rivals see the same images, steps, budgets and seeds; of what a method's own paper states otherwise, `_printed.py` has the rate
of VisionSelector and OC-VTP, and the weight decay and first temperature of Dynamic-LLaVA. ATP-LLaVA and Dynamic-LLaVA look at the
question, which is one and the same request for captions here; their papers train on conversations, as below. BTP and the curve of
PoRe are fitted to 64 of the images, without steps.

A question-aware arm needs questions, which captions have none of; conversations of LLaVA-665K have them:

    diffprune run train_llava15_7b --name llava15-aware --set 'train.pruners=["diffprune(question_aware=True)"]' \\
        --set "train.data=jsonl('data/llava_v1_5_mix665k.json', images='data')"

From the paper: AdamW, learning rate 2e-4 with cosine decay, batch 32, one epoch over 128,000 images (4,000 steps), temperature
2.0 to 0.1 along a cosine over 2,000 steps, budgets 192, 128 and 64, scorer of two blocks 1,024 wide with 16 heads, frozen VLM.
Where it is silent we take: one scorer for all budgets, drawn per step; weight decay 0.01, 3 % warm-up, clipping at 1; features
standardised per channel over 64 images; the caption request below in the checkpoint's own chat template; frozen weights in
bfloat16, scorer and loss in float32; FFN of four times the width; three seeds. Where we differ: scores have unit spread in each
image before the temperature divides them; the paper's s / tau is `diffprune(scale='free')`. It stops early by validation loss; we
run all steps, as the rate ends at zero, and log the loss on 32 held-out images with tokens really removed.

A GPU of 48 GB holds a micro-batch of 8 images without checkpointing too (`--set train.checkpointing=False`), which saves a third
of the time. Models that fit no GPU: `--set train.shard=True --set train.workers=4`.
"""

from _printed import CALIBRATED, SETTINGS, TRAINED

from diffprune.job import Job, Recipe

MODEL = "llava-hf/llava-1.5-7b-hf"

job = Job(
    name="train_llava15_7b",
    title="DiffPrune for LLaVA-1.5-7B",
    model=MODEL,
    family="llava",
    config={
        "model_type": "llava",
        "text_config": {
            "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
    },
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
        budgets=("Keep(192)", "Keep(128)", "Keep(64)"),
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
    budgets=("Keep(192)", "Keep(128)", "Keep(64)"),
    report=False,
    tiny={"train.budgets": ("Share(2/3)", "Share(1/3)")},
)  # fmt: skip
