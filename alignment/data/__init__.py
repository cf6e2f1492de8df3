"""Floor 2, data: read an annotated data set as pictures with their captions, and report what is wrong with it.

Place in the flow: `data set -> read_data (here) -> train, evaluate, gallery`. The format is detected from the path;
`reader.FORMATS` lists a reader for each. A reader yields a `RawAnnotation` for what is written; the `Collector` finds
the pictures and counts what is left out or repaired. What is ambiguous is an error.
"""

from alignment.data.collector import AmbiguousImageNames, EmptyDataset, Pair, describe_issues, describe_truncated
from alignment.data.deduplicate import ImageHash, drop_leaked, hash_images, merge_duplicates, summarize_data
from alignment.data.reader import Partition, ReadResult, read_data

__all__ = ["AmbiguousImageNames", "EmptyDataset", "ImageHash", "Pair", "Partition", "ReadResult", "describe_issues"]
__all__ += ["describe_truncated", "drop_leaked", "hash_images", "merge_duplicates", "read_data", "summarize_data"]
