"""Train a dual encoder the way of transformers' contrastive-image-text example, as the peer of `training_speed.py`.

Written from that example's description, for this comparison alone: a table with one caption a row, captions tokenized
beforehand and padded to the longest a text may be, pictures decoded and transformed by torchvision (scripted, where
torch still can) as they are asked for, and transformers' Trainer with the model's own loss (`return_loss=True`).
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from torchvision import transforms  # noqa: TID251
from torchvision.io import ImageReadMode, read_image  # noqa: TID251
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    disable_progress_bars()
    model = AutoModel.from_pretrained(arguments.model)
    trainer = Trainer(
        model=model,
        args=settings(arguments),
        train_dataset=rows(arguments.data, arguments.model, model.config),
        data_collator=collate,
    )
    trainer.train()
    trainer.save_model()


def settings(arguments: argparse.Namespace) -> TrainingArguments:
    """Leave to the Trainer's defaults what the example leaves to them."""
    return TrainingArguments(
        output_dir=arguments.output,
        remove_unused_columns=False,
        per_device_train_batch_size=arguments.batch_size,
        max_steps=arguments.steps,
        learning_rate=arguments.lr,
        weight_decay=0.1,
        warmup_steps=0,
        dataloader_num_workers=arguments.workers,
        use_cpu=arguments.device == "cpu",
        bf16=arguments.precision == "bf16",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def rows(table: str, folder: str, config: Any) -> Dataset:
    """Read the table; token ids are made now, pixels whenever a row is asked for."""
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    longest = config.text_config.max_position_embeddings
    pixels = picture_transform(config.vision_config.image_size, processor.image_mean, processor.image_std)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(batch["caption"], padding="max_length", max_length=longest, truncation=True))

    def with_pixels(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pictures = (read_image(path, mode=ImageReadMode.RGB) for path in batch["image"])
        return {**batch, "pixel_values": [pixels(picture) for picture in pictures]}

    dataset = Dataset.from_csv(table, keep_in_memory=True).map(tokenize, batched=True, remove_columns=["caption"])
    dataset.set_transform(with_pixels)
    return dataset


def picture_transform(side: int, mean: list[float], std: list[float]) -> nn.Module:
    """Resize the short side, crop the middle, scale and normalise: uint8 tensor (3, height, width) to float."""
    steps = nn.Sequential(
        transforms.Resize([side], interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(side),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize(mean, std),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        try:
            return torch.jit.script(steps)
        except (AttributeError, NotImplementedError, RuntimeError):  # and gone, for Python 3.14
            return steps


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor | bool]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "input_ids": torch.tensor([example["input_ids"] for example in examples]),
        "attention_mask": torch.tensor([example["attention_mask"] for example in examples]),
        "return_loss": True,
    }


if __name__ == "__main__":
    main()
