"""The small LLaVA: the shipped small CLIP's frozen image tower, LLaVA's projector and a Llama decoder, in transformers.

All questions about a picture share one copy of its 65 image tokens: after them each question is a branch of its own
that sees the picture and itself alone, at the positions that it would have in a conversation of its own. So seven
questions cost little more than two would by themselves, and no answer gives another one away.

A decoder that starts from nothing first learns the questions from captions that stand where the image tokens would
(LLaVA's decoder has read text before, too). Then pictures take their place: as in LLaVA the projector alone learns
first, so that what it makes of them at the beginning does not undo what the decoder knows; then both do.
"""

import argparse
import math
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pretraining.clip import MODEL_CONFIG
from pretraining.conversations import Facts, Questioner, Turn, read_facts
from pretraining.log import open_log
from pretraining.pairs import IMAGE_SIZE, normalise, read_held_out_pairs, read_training_pairs
from r1p_dist.backbones.conversations import IGNORED
from r1p_dist.kinds.open_clip.hf import BLOCK_NAMES, OUTSIDE_NAMES

VOCABULARY = 5120
CONTEXT_LENGTH = 512
WIDTH = 256
PATCH_SIZE = MODEL_CONFIG["vision_cfg"]["patch_size"]
IMAGE_TOKENS = 1 + (IMAGE_SIZE // PATCH_SIZE) ** 2  # [CLS] and the patches
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}{{- message['role'].upper() + ': ' -}}{%- endif -%}
    {%- set texts = [] -%}
    {%- if message['content'] is string -%}
        {%- set texts = [message['content']] -%}
    {%- else -%}
        {%- for content in message['content'] if content['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
        {%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- texts | join(' ') + '</s>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- texts | join(' ') + ' ' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


class Batch(NamedTuple):
    """Packed questions about some pictures; the tensors are (pictures, tokens).

    branches: 0 for what all questions share, else the question's number. labels: the token itself in an answer, else
    IGNORED.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    branches: torch.Tensor
    labels: torch.Tensor

    def attention_mask(self) -> torch.Tensor:
        """Returns (pictures, 1, tokens, tokens), true where a token may look: back, at its own branch or the trunk."""
        length = self.tokens.shape[1]
        own = self.branches[:, :, None] == self.branches[:, None]
        return ((own | (self.branches == 0)[:, None]) & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE; digits stand alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL_TOKENS.values(), IMAGE_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    start = SPECIAL_TOKENS["bos_token"]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, bpe.token_to_id(start))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **SPECIAL_TOKENS,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=CONTEXT_LENGTH,
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Returns the processor of text and pictures; a picture's longer side is cropped."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(open_clip.OPENAI_DATASET_MEAN),
        image_std=list(open_clip.OPENAI_DATASET_STD),
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int, feature_layer: int) -> LlavaForConditionalGeneration:
    """Returns the model with random weights.

    feature_layer: which hidden state of the image tower the decoder sees, counted from the last one, -1.
    """
    vision = MODEL_CONFIG["vision_cfg"]
    special_ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=4 * vision["width"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // vision["head_width"],
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_act="gelu",
            projection_dim=MODEL_CONFIG["embed_dim"],
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=704,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            initializer_range=WIDTH**-0.5,
            **special_ids,
        ),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **special_ids)
    return model


def load_image_tower(tower: CLIPVisionModel, clip: torch.nn.Module) -> None:
    """Copies the image tower of an open_clip model into transformers' and freezes it there."""
    weights = {}
    for name, weight in clip.visual.state_dict().items():
        if block := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name):
            number, part, kind = block.groups()
            if part == "attn.in_proj":
                for projection, rows in zip("qkv", weight.chunk(3), strict=True):
                    weights[f"encoder.layers.{number}.self_attn.{projection}_proj.{kind}"] = rows
            else:
                weights[f"encoder.layers.{number}.{BLOCK_NAMES[part]}.{kind}"] = weight
        elif name != "proj":
            weights[OUTSIDE_NAMES[f"visual.{name}"].removeprefix("vision_model.")] = weight
    tower.load_state_dict(weights)
    tower.requires_grad_(False)


@torch.no_grad()
def standardise_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> None:
    """Starts the projector with weights that standardise the features of uint8 pictures (n, 3, h, w).

    What all pictures have in common would otherwise drown what tells them apart for most of a short training.
    """
    layer, projector = model.config.vision_feature_layer, model.model.multi_modal_projector
    states = model.model.vision_tower(normalise(pixels.float() / 255), output_hidden_states=True).hidden_states
    features = states[layer].flatten(0, 1)
    first, second = projector.linear_1, projector.linear_2
    first.weight.normal_(std=first.in_features**-0.5).div_(features.std(0))
    first.bias.copy_(-first.weight @ features.mean(0))
    second.weight.normal_(std=model.config.text_config.initializer_range * second.in_features**-0.5)


class Packer:
    """Turns questions about pictures into batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._start = tokenizer("USER: ").input_ids
        self._image = tokenizer.image_token_id

    def branch(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Returns the tokens and the labels of a conversation, from the end of the image tokens on."""
        texts = []
        for i, turn in enumerate(turns):
            texts += [f"{'USER: ' if i else chr(10)}{turn.question} ASSISTANT:", f" {turn.answer}"]
        tokens, labels = [], []
        for i, part in enumerate(self._tokenizer(texts, add_special_tokens=False).input_ids):
            is_answer = i % 2 == 1
            part = [*part, self._tokenizer.eos_token_id] if is_answer else part
            tokens += part
            labels += part if is_answer else [IGNORED] * len(part)
        return tokens, labels

    def pack(
        self, pictures: Sequence[Sequence[tuple[list[int], list[int]]]], captions: Sequence[str] | None = None
    ) -> Batch:
        """Packs the branches of each picture behind its image tokens, or behind the caption that stands for it."""
        trunks = [self._start + [self._image] * IMAGE_TOKENS] * len(pictures)
        if captions is not None:
            trunks = [
                self._start + part for part in self._tokenizer(list(captions), add_special_tokens=False).input_ids
            ]
        rows = [
            (trunk, branches, len(trunk) + sum(len(tokens) for tokens, _ in branches))
            for trunk, branches in zip(trunks, pictures, strict=True)
        ]
        shape = len(rows), -(-max(length for _, _, length in rows) // 16) * 16
        batch = Batch(*(torch.zeros(shape, dtype=torch.long) for _ in range(3)), torch.full(shape, IGNORED))
        for row, (trunk, branches, length) in enumerate(rows):
            at = len(trunk)
            batch.tokens[row, :at] = torch.tensor(trunk)
            batch.positions[row, :at] = torch.arange(at)
            for number, (tokens, labels) in enumerate(branches, start=1):
                span = slice(at, at + len(tokens))
                batch.tokens[row, span] = torch.tensor(tokens)
                batch.positions[row, span] = torch.arange(len(trunk), len(trunk) + len(tokens))
                batch.branches[row, span] = number
                batch.labels[row, span] = torch.tensor(labels)
                at = span.stop
            batch.branches[row, length:] = -1
        return batch


def training_batches(
    facts: list[Facts],
    questioner: Questioner,
    packer: Packer,
    batch_size: int,
    rng: random.Random,
    *,
    from_captions: bool = False,
) -> Iterator[tuple[list[int], Batch]]:
    """Yields, for ever, which pictures a batch is about and the batch; batches hold pictures of similar length.

    from_captions: the caption stands where the image tokens would.
    """
    pool = 16 * batch_size
    order: list[int] = []
    while True:
        if len(order) < pool:
            order += rng.sample(range(len(facts)), len(facts))
        drawn, order = order[:pool], order[pool:]
        branches = []
        for picture in drawn:
            # The names and the options are what tells pictures apart: twice as many questions about them.
            turns = questioner.draw(facts[picture], rng) + questioner.draw(facts[picture], rng)[2:4]
            rng.shuffle(turns)
            cut = 2 if rng.random() < 0.25 else 1  # now and then a conversation of two turns
            branches.append([packer.branch(part) for part in (turns[:cut], *([turn] for turn in turns[cut:]))])
        by_length = sorted(range(pool), key=lambda i: sum(len(tokens) for tokens, _ in branches[i]))
        batches = [by_length[i : i + batch_size] for i in range(0, pool, batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            pictures = [drawn[i] for i in batch]
            captions = [facts[picture].tagged for picture in pictures] if from_captions else None
            yield pictures, packer.pack([branches[i] for i in batch], captions)


def answer_logits(
    model: LlavaForConditionalGeneration, pixels: torch.Tensor | None, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits (answer tokens, vocabulary) and the answer tokens, of uint8 pictures (n, 3, h, w), if any."""
    # bf16 products are several times faster; the fused bf16 attention of CPUs is the exception, so no fused kernel.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        hidden = model.model(
            input_ids=batch.tokens,
            pixel_values=None if pixels is None else normalise(pixels.float() / 255),
            attention_mask=batch.attention_mask(),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        is_answer = batch.labels[:, 1:] != IGNORED
        logits = model.lm_head(hidden[:, :-1][is_answer])
    return logits.float(), batch.labels[:, 1:][is_answer]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def evaluate(
    model: LlavaForConditionalGeneration, pixels: torch.Tensor, questions: list[list[Turn]], packer: Packer
) -> dict[str, dict[str, float]]:
    """Returns, by skill, the answers in percent that are exactly right and the mean loss of an answer's token.

    questions: of each picture. Teacher forcing gives the same as greedy decoding here: an answer is right if every one
    of its tokens is.
    """
    model.eval()
    right: dict[str, list[bool]] = {}
    losses: dict[str, list[float]] = {}
    for start in range(0, len(questions), 32):
        chunk = questions[start : start + 32]
        branches = [[packer.branch([turn]) for turn in turns] for turns in chunk]
        logits, answers = answer_logits(model, pixels[start : start + 32], packer.pack(branches))
        lengths = [sum(label != IGNORED for label in labels) for picture in branches for _, labels in picture]
        loss = F.cross_entropy(logits, answers, reduction="none").split(lengths)
        is_right = (logits.argmax(1) == answers).split(lengths)
        for i, turn in enumerate(turn for turns in chunk for turn in turns):
            right.setdefault(turn.skill, []).append(is_right[i].all().item())
            losses.setdefault(turn.skill, []).extend(loss[i].tolist())
    model.train()
    return {
        skill: {
            "exact": round(100 * sum(right[skill]) / len(right[skill]), 1),
            "loss": round(sum(losses[skill]) / len(losses[skill]), 3),
        }
        for skill in sorted(right)
    }


def trivial_answers(turns: list[Turn]) -> dict[str, float]:
    """Returns, by skill, the percent of right answers of the most frequent answer or of a guess among the options."""
    result = {}
    for skill in sorted({turn.skill for turn in turns}):
        own = [turn for turn in turns if turn.skill == skill]
        frequent = Counter(turn.answer for turn in own).most_common(1)[0][1]
        guessed = sum(1 / turn.options for turn in own if turn.options)
        result[skill] = round(100 * max(frequent, guessed) / len(own), 1)
    return result


def build_optimizers(
    model: LlavaForConditionalGeneration, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the decoder's blocks, AdamW for the embedding, the projector and the norms."""
    decoder = model.model.language_model
    matrices = [p for p in decoder.layers.parameters() if p.ndim == 2]
    norms = [p for p in decoder.parameters() if p.ndim == 1]
    rest = [decoder.embed_tokens.weight, *model.model.multi_modal_projector.parameters(), *norms]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, output: Path) -> None:
    """Writes model (half precision) and processor, each file at once: whoever loads meanwhile finds whole files."""
    weights = {name: weight.half() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        model.save_pretrained(folder, state_dict=weights)  # without the head: it is the embedding
        processor.save_pretrained(folder)
        for file in Path(folder).iterdir():
            file.chmod(0o644)
            os.replace(file, output / file.name)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    report = open_log(args.output)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    pixels, captions, keys = read_training_pairs(args.pairs)
    facts = [read_facts(key, caption) for key, caption in zip(keys, captions, strict=True)]
    questioner = Questioner(facts)
    turns = [turn for fact in facts for turn in questioner.draw(fact, rng)]
    tokenizer = train_tokenizer([f"USER: \n{turn.question} ASSISTANT: {turn.answer}" for turn in turns])
    packer, processor = Packer(tokenizer), build_processor(tokenizer)

    val_pixels, val_captions, val_keys = read_held_out_pairs(args.pairs)
    val_facts = [read_facts(key, caption) for key, caption in zip(val_keys, val_captions, strict=True)]
    val_questioner, val_rng = Questioner(val_facts), random.Random(args.seed)
    questions = [val_questioner.draw(fact, val_rng) for fact in val_facts]
    asked = [turn for turns in questions for turn in turns]

    model = build_model(tokenizer, args.layers, args.feature_layer)
    load_image_tower(model.model.vision_tower, open_clip.create_model(f"local-dir:{args.clip}"))
    standardise_features(model, pixels[torch.randperm(len(pixels))[:512]])
    trained = torch.nn.ModuleList([model.model.multi_modal_projector, model.model.language_model])
    optimizers = build_optimizers(model, args.lr, args.weight_decay)
    report(
        seed=args.seed, pairs=len(facts), held_out=len(val_facts), vocabulary=len(tokenizer),
        parameters=sum(p.numel() for p in model.parameters()), trained=sum(p.numel() for p in trained.parameters()),
        steps=args.steps, caption_steps=args.caption_steps, projector_steps=args.projector_steps,
        batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay, layers=args.layers,
        feature_layer=args.feature_layer, torch=torch.__version__, transformers=transformers.__version__,
    )  # fmt: skip
    report(questions=Counter(turn.skill for turn in asked), trivial=trivial_answers(asked))

    model.train()
    model.model.language_model.compile(dynamic=True)  # its many small products and sums are 1.5 times faster fused
    warmup = args.steps // 15
    started, running = time.perf_counter(), 0.0
    data = facts, questioner, packer, args.batch_size, rng
    batches = chain(islice(training_batches(*data, from_captions=True), args.caption_steps), training_batches(*data))
    for step, (pictures, batch) in zip(range(args.steps), batches, strict=False):
        decoder_is_frozen = args.caption_steps <= step < args.caption_steps + args.projector_steps
        model.model.language_model.requires_grad_(not decoder_is_frozen)
        ramp = (step + 1) / warmup if step < warmup else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (args.steps - warmup)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * ramp * cosine
        loss = F.cross_entropy(*answer_logits(model, None if step < args.caption_steps else pixels[pictures], batch))
        trained.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        running += loss.item()
        if (step + 1) % 50 == 0:
            minutes = round((time.perf_counter() - started) / 60, 2)
            report(step=step + 1, loss=round(running / 50, 4), minutes=minutes)
            running = 0.0
        if (step + 1) % args.save_steps == 0 or step + 1 == args.steps:
            report(step=step + 1, held_out=evaluate(model, val_pixels, questions, packer))
            save(model, processor, args.output)
    # How much of it needs the picture: the same questions, each about the picture of another pair.
    others = torch.randperm(len(val_pixels), generator=torch.Generator().manual_seed(args.seed))
    report(other_pictures=evaluate(model, val_pixels[others], questions, packer))
