"""The small CLIP, in open_clip.

A vocabulary of 8,192 learnt from the captions keeps the weights small; most patches are dropped for most of the
training, as in FLIP (arXiv 2212.00794), which makes the image tower several times cheaper.
"""

import argparse
import json
import math
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from pretraining.log import open_log
from pretraining.pairs import IMAGE_SIZE, normalise, read_held_out_pairs, read_training_pairs, without_tags

CONTEXT_LENGTH = 32
MODEL_CONFIG = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 6, "width": 192, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": 8192,
        "hf_tokenizer_name": "tiny",
        "width": 192,
        "heads": 6,
        "layers": 4,
    },
}


def train_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE in CLIP's format; the end token has the highest id, as CLIP's argmax pooling needs."""
    bpe = Tokenizer(models.BPE(unk_token=None, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL_CONFIG["text_cfg"]["vocab_size"] - 2,
        special_tokens=["<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    # The bytes themselves as words teach the alphabet's end-of-word forms, so that no text is unknown.
    bpe.train_from_iterator(captions + [chr(i) for i in range(33, 0x250)], trainer)
    bpe.add_special_tokens(["<start>", "<end>"])
    start, end = bpe.token_to_id("<start>"), bpe.token_to_id("<end>")
    bpe.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<start>", eos_token="<end>", model_max_length=CONTEXT_LENGTH
    )


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turns uint8 pictures (n, 3, h, w) into floats in [0, 1], each with its own small affine and colour change."""
    n = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, zoom = uniform(-0.2, 0.2), uniform(0.7, 1.1)
    stretch = uniform(0.85, 1.18)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = uniform(-0.15, 0.15, 2)
    theta = torch.stack(
        [torch.stack([cos * stretch, -sin, shift[:, 0]], 1), torch.stack([sin, cos / stretch, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    images = F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)
    gray = images.mean(1, keepdim=True).expand_as(images)
    pick = uniform(0, 1, 1, 1, 1)
    images = torch.where(pick < 0.2, gray, images)
    images = torch.where(uniform(0, 1, 1, 1, 1) < 0.1, 1 - images, images)
    return (images * uniform(0.7, 1.3, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)).clamp(0, 1)


def contrastive_loss(
    image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's loss with equal captions as positives of each other: image and text (n, d) of unit norm, labels (n,)."""
    targets = (labels[:, None] == labels[None]).float()
    targets = targets / targets.sum(1, keepdim=True)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@torch.no_grad()
def retrieval(model: torch.nn.Module, pixels: torch.Tensor, tokens: torch.Tensor, captions: list[str]) -> dict:
    """Recall in percent over the held-out pairs; any picture with an equal caption counts as right."""
    model.eval()
    image = torch.cat(
        [F.normalize(model.encode_image(normalise(chunk.float() / 255)), dim=-1) for chunk in pixels.split(256)]
    )
    text = torch.cat([F.normalize(model.encode_text(chunk), dim=-1) for chunk in tokens.split(256)])
    model.train()
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([ids[caption] for caption in captions])
    same = labels[:, None] == labels[None]
    similarity = image @ text.T
    result = {}
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        for k in (1, 5, 10):
            hit = same.gather(1, scores.topk(k, dim=1).indices).any(1)
            result[f"{name}_recall@{k}"] = round(100 * hit.float().mean().item(), 2)
    return result


def encode_trimmed(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the text features (n, d) of padded tokens (n, l), run up to the last end token: the tower is causal."""
    end = tokens.argmax(1)
    length = int(end.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x)), end] @ model.text_projection


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes weights (half precision), configuration and tokenizer in open_clip's `local-dir:` layout."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, output / "open_clip_model.safetensors")
    preprocess = {"size": IMAGE_SIZE, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": preprocess}
    (output / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(output)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    report = open_log(args.output)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    pixels, captions, _ = read_training_pairs(args.pairs)
    val_pixels, val_captions, _ = read_held_out_pairs(args.pairs)
    tokenizer = train_tokenizer(captions)

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(
            texts, return_tensors="pt", max_length=CONTEXT_LENGTH, padding="max_length", truncation=True
        ).input_ids

    # Each pair has two forms of its caption, with and without tags; a step draws one.
    forms = [captions, [without_tags(caption) for caption in captions]]
    ids = {text: i for i, text in enumerate(dict.fromkeys(forms[0] + forms[1]))}
    labels = torch.tensor([[ids[text] for text in form] for form in forms])
    tokens = torch.stack([tokenize(form) for form in forms])
    val_tokens = tokenize(val_captions)

    vision = {**MODEL_CONFIG["vision_cfg"], "patch_dropout": args.patch_dropout}
    model = open_clip.model.CLIP(**{**MODEL_CONFIG, "vision_cfg": vision})
    whole = model.visual.patch_dropout.__class__(0.0)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    report(
        seed=args.seed, pairs=len(captions), held_out=len(val_captions), vocabulary=len(tokenizer),
        parameters=sum(p.numel() for p in model.parameters()), steps=args.steps, batch_size=args.batch_size,
        lr=args.lr, weight_decay=args.weight_decay, patch_dropout=args.patch_dropout,
        whole_image_steps=args.whole_image_steps, torch=torch.__version__, open_clip=open_clip.__version__,
    )  # fmt: skip

    model.train()
    warmup = args.steps // 20
    order, started, running = torch.empty(0, dtype=torch.long), time.perf_counter(), 0.0
    for step in range(args.steps):
        if step == args.steps - args.whole_image_steps:
            model.visual.patch_dropout = whole
        ramp = (step + 1) / warmup if step < warmup else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (args.steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * ramp * cosine
        if len(order) < args.batch_size:
            order = torch.cat([order, torch.randperm(len(captions), generator=generator)])
        batch, order = order[: args.batch_size], order[args.batch_size :]
        form = torch.randint(2, (args.batch_size,), generator=generator)
        text = tokens[form, batch]
        image = normalise(augment(pixels[batch], generator))
        # bf16 products are several times faster; the fused bf16 attention of CPUs is the exception, so no fused kernel.
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image_features = model.encode_image(image)
            text_features = encode_trimmed(model, text)
        loss = contrastive_loss(
            F.normalize(image_features.float(), dim=-1),
            F.normalize(text_features.float(), dim=-1),
            labels[form, batch],
            model.logit_scale.exp(),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        running += loss.item()
        if (step + 1) % 50 == 0:
            minutes = round((time.perf_counter() - started) / 60, 2)
            report(
                step=step + 1,
                loss=round(running / 50, 4),
                minutes=minutes,
                logit_scale=round(model.logit_scale.exp().item(), 2),
            )
            running = 0.0
        if (step + 1) % 400 == 0 or step + 1 == args.steps:
            report(step=step + 1, **retrieval(model, val_pixels, val_tokens, val_captions))
            save(model, tokenizer, args.output)
