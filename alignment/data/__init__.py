"""Floor 2, the data: read an annotated data set as images with their captions, and say what is wrong with it.

Place in the flow: `data set -> read_pairs, check_data (here) -> train, evaluate, gallery`. The format is found from the
path:

| format       | what it is |
|--------------|------------|
| `karpathy`   | `dataset_{flickr8k,flickr30k,coco}.json` with its splits (`restval` counts as train) |
| `flickr8k`   | `Flickr8k.token.txt` with the lists `Flickr_8k.{train,dev,test}Images.txt` beside it |
| `flickr30k`  | `results_20130124.token`, or `results.csv` parted by bars; lists `{train,val,test}.txt` if beside it |
| `coco`       | `captions_{train,val}{2014,2017}.json`, or the same by other names |
| `jsonl`      | JSON lines, or one document (`json_forms`), with an image and one or more captions for each |
| `csv`        | the same as CSV or TSV, in any usual encoding, best with a header; Kaggle's `captions.txt` too |
| `parquet`    | the same as parquet (the extra `hub`) |
| `webdataset` | a `.tar` shard, a folder of them, or a pattern: `shards/train-{000..009}.tar`, `shards/*.tar` |
| `folder`     | pictures, captioned by tables below (the Hub's imagefolder) or by `0001.txt` beside `0001.jpg` |
| `hub`        | OWNER/NAME or OWNER/NAME@REVISION of a data set on the Hugging Face Hub (the extra `hub`) |

What a reader cannot tell it refuses by name; what it leaves out or repairs it counts (`ReadResult`).

A reader a format, listed in `formats.FORMATS`, only says what is written; `Collection` decides what of it counts.
"""

from alignment.data.collector import AmbiguousImageNames, EmptyDataset, Pair
from alignment.data.columns import CAPTION_COLUMNS, ID_COLUMNS, IMAGE_COLUMNS
from alignment.data.deduplicate import (
    ImageHash,
    drop_leaked,
    hash_images,
    merge_duplicates,
    near_duplicates,
)
from alignment.data.partition import Partition
from alignment.data.reader import ReadResult, positive_mask, read_data, read_pairs
from alignment.data.report import DataReport, Overlap, Told, check_data, describe_issues, describe_truncated

__all__ = [
    "CAPTION_COLUMNS",
    "ID_COLUMNS",
    "IMAGE_COLUMNS",
    "AmbiguousImageNames",
    "DataReport",
    "EmptyDataset",
    "ImageHash",
    "Overlap",
    "Pair",
    "Partition",
    "ReadResult",
    "Told",
    "check_data",
    "describe_issues",
    "describe_truncated",
    "drop_leaked",
    "hash_images",
    "merge_duplicates",
    "near_duplicates",
    "positive_mask",
    "read_data",
    "read_pairs",
]
