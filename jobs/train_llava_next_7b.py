"""DiffPrune scorers for LLaVA-NeXT-7B (LLaVA 1.6 with Vicuna), as the paper trains them (arXiv 2605.28051), and trained rivals.

    diffprune run train_llava_next_7b --dry-run      # memory and hours, from the numbers below; needs no download
    diffprune run train_llava_next_7b --tiny         # the same code on a tiny random LLaVA-NeXT, in seconds
    diffprune run train_llava_next_7b --scorer diffprune     # one GPU; resumes where it stopped
    diffprune run train_llava_next_7b                # all methods that `table_llava_next_7b.py` compares

Data, optimizer, schedule, our choices and the rivals are those of `train_llava15_7b.py`: the paper reuses them unchanged. What
differs: up to 2,880 visual tokens of an overview and four tiles, under one budget of 320 (the paper's only one); newline tokens
are not scored, stay while their line has a token, and are counted apart. An image takes five times the memory, hence two at once,
recomputed layers, and 32 images for the means and deviations of features. ATP-LLaVA is not trained here: the four layers before its
first cut alone make an average of 360 tokens.
"""

from _printed import CALIBRATED, SETTINGS, TRAINED

from diffprune.job import Job, Recipe

MODEL = "llava-hf/llava-v1.6-vicuna-7b-hf"

job = Job(
    name="train_llava_next_7b",
    title="DiffPrune for LLaVA-NeXT-7B",
    model=MODEL,
    family="llava_next",
    config={
        "model_type": "llava_next",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
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
        pruners=(*(method for method in TRAINED if method != "atp"), *CALIBRATED),
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
        budgets=("Keep(320)",),
        calibration_images=32,
        validation_images=16,
        dtype="bfloat16",
        micro_images=2,
        checkpointing=True,
        checkpoint_every=250,
        validate_every=250,
        grad_cosine_every=0,
        workers=1,
        methods=SETTINGS,
    ),
    baselines=("unpruned",),
    budgets=("Keep(320)",),
    report=False,
    tiny={"train.budgets": ("Share(2/3)", "Share(1/3)")},
)  # fmt: skip
