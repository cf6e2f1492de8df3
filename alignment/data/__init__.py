"""Floor 2, data: read an annotated data set as pictures with their captions, and report what is wrong with it.

Place in the flow: `data set -> read_data, check_data (here) -> train, evaluate, gallery`. The format is detected from
the path:

| format       | what it is |
|--------------|------------|
| `karpathy`   | `dataset_{flickr8k,flickr30k,coco}.json` with its splits (`restval` counts as train) |
| `flickr8k`   | `Flickr8k.token.txt` with the lists `Flickr_8k.{train,dev,test}Images.txt` beside it |
| `flickr30k`  | `results_20130124.token`, or `results.csv` with bars between columns; lists `{train,val,test}.txt` |
| `coco`       | `captions_{train,val}{2014,2017}.json`, or the same by other names |
| `jsonl`      | JSON lines, or one document (`json_documents`), with a picture and one or more captions for each |
| `csv`        | the same as CSV or TSV, in any usual encoding, best with a header; Kaggle's `captions.txt` too |
| `parquet`    | the same as parquet (the extra `hub`) |
| `webdataset` | a `.tar` shard, a folder of them, or a pattern: `shards/train-{000..009}.tar`, `shards/*.tar` |
| `folder`     | pictures, captioned by tables below (the Hub's imagefolder) or by `0001.txt` beside `0001.jpg` |
| `hub`        | OWNER/NAME or OWNER/NAME@REVISION of a data set on the Hugging Face Hub (the extra `hub`) |

`formats.FORMATS` lists a reader for each. A reader yields a `RawAnnotation` for what is written; the `Collector` finds
the pictures and counts what is left out or repaired. What is ambiguous is an error.
"""

from alignment.data.collector import AmbiguousImageNames, EmptyDataset, Pair
from alignment.data.deduplicate import ImageHash, drop_leaked, hash_images, merge_duplicates, near_duplicates
from alignment.data.reader import Partition, ReadResult, positive_mask, read_data, read_pairs
from alignment.data.report import describe_issues, describe_truncated, summarize_data

__all__ = [
    "AmbiguousImageNames",
    "EmptyDataset",
    "ImageHash",
    "Pair",
    "Partition",
    "ReadResult",
    "describe_issues",
    "describe_truncated",
    "drop_leaked",
    "hash_images",
    "merge_duplicates",
    "near_duplicates",
    "positive_mask",
    "read_data",
    "read_pairs",
    "summarize_data",
]
