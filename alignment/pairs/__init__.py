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

What a reader cannot tell it refuses by name; what it leaves out or repairs it counts (`Reading`).

A reader a format, listed in `formats.FORMATS`, only says what is written; `Collection` decides what of it counts.
"""

from alignment.pairs.audit import (
    ImagePrint,
    fingerprint_images,
    look_alikes,
    merge_duplicates,
    without_overlap,
)
from alignment.pairs.collection import AmbiguousNames, NothingLeft, Pair
from alignment.pairs.columns import CAPTION_COLUMNS, ID_COLUMNS, IMAGE_COLUMNS
from alignment.pairs.reading import Reading, positives_of, read_data, read_pairs
from alignment.pairs.report import DataReport, Overlap, Told, check_data, told, told_cut
from alignment.pairs.sharing import Share

__all__ = [
    "CAPTION_COLUMNS",
    "ID_COLUMNS",
    "IMAGE_COLUMNS",
    "AmbiguousNames",
    "DataReport",
    "ImagePrint",
    "NothingLeft",
    "Overlap",
    "Pair",
    "Reading",
    "Share",
    "Told",
    "check_data",
    "fingerprint_images",
    "look_alikes",
    "merge_duplicates",
    "positives_of",
    "read_data",
    "read_pairs",
    "told",
    "told_cut",
    "without_overlap",
]
