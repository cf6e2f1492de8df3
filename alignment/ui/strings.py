"""Top floor, the words of the page: English and Chinese, by key.

Errors are translated by their code: `InputError("...", "image.empty")` looks up "error.image.empty".
"""

from __future__ import annotations

from collections.abc import Mapping

from alignment.preprocess import InputError

LANGUAGES = {"en": "English", "zh": "中文"}
DEFAULT_LANGUAGE = "en"

STRINGS: dict[str, dict[str, str]] = {
    "en": {
        "title": "Image–text alignment",
        "tagline": "Find words for a picture, and pictures for words.",
        "language": "Language",
        "footer.model": "Model {model} · {pictures} pictures and {captions} captions in the gallery",
        "footer.private": "What you drop in is read in memory, for your visit alone, and not kept.",
        "footer.api": "API",
        # Image to captions
        "captions.tab": "Image to captions",
        "captions.results": "Captions that fit",
        "captions.count": "The best {count} of {total} captions",
        "captions.none": "This gallery has no captions. Your own can be scored in the tab “Similarity matrix”.",
        "captions.example": "Or try one of these",
        # Caption to images
        "pictures.tab": "Caption to images",
        "pictures.query": "Caption",
        "pictures.placeholder": "Describe a picture, in English or Chinese",
        "pictures.search": "Search",
        "pictures.results": "Pictures that fit",
        "pictures.count": "The best {count} of {total} pictures",
        "pictures.none": "This gallery has no pictures. Search photos of your own in the tab “My photos”.",
        "pictures.example": "Try",
        # Similarity matrix
        "matrix.tab": "Similarity matrix",
        "matrix.pictures": "Pictures",
        "matrix.captions": "Captions, one a line",
        "matrix.compare": "Compare",
        "matrix.sample": "These pictures are a sample. Your own replace them.",
        "matrix.clear": "Clear pictures",
        "matrix.view": "Values",
        "matrix.view.cosine": "Cosine",
        "matrix.view.captions": "Softmax over captions",
        "matrix.view.pictures": "Softmax over pictures",
        "matrix.meaning.cosine": "How close picture and caption lie, from -1 to 1. Compare values within this table.",
        "matrix.meaning.captions": "The captions compete for each picture: every column adds up to 100 %.",
        "matrix.meaning.pictures": "The pictures compete for each caption: every row adds up to 100 %.",
        "matrix.table": "Similarity of {captions} captions (rows) and {pictures} pictures (columns)",
        "matrix.best_picture": "best picture for this caption",
        "matrix.best_caption": "best caption for this picture",
        "matrix.remove": "Remove {name}",
        "matrix.empty": "Add a picture and type a caption to compare them.",
        "matrix.head": "Caption",
        # My photos
        "photos.tab": "My photos",
        "photos.query": "Caption",
        "photos.search": "Search my photos",
        "photos.clear": "Clear my photos",
        "photos.sample": "A sample collection. Drop in photos of your own and it makes way for them.",
        "photos.own.one": "1 photo, in memory for this visit alone. It is gone when you clear it or leave.",
        "photos.own": "{count} photos, in memory for this visit alone. They are gone when you clear them or leave.",
        "photos.cleared": "Your photos are gone.",
        "photos.results": "Photos that fit",
        "photos.count": "The best {count} of {total} photos",
        # the place to drop files
        "drop.one": "Choose a picture",
        "drop.other": "Choose another picture",
        "drop.many": "Add pictures",
        "drop.photos": "Add up to {limit} photos",
        "drop.how": "or drop it here, or paste it",
        "drop.how.many": "or drop them here, or paste",
        "drop.busy": "Reading …",
        "drop.uploading": "Uploading {done} of {total} …",
        "drop.reading": "Reading {done} of {total} …",
        "drop.preview": "Your picture: {name}",
        "drop.added.one": "1 picture added.",
        "drop.added": "{count} pictures added.",
        "drop.skipped.one": "1 file was left out:",
        "drop.skipped": "{count} files were left out:",
        "drop.more": "and {count} more",
        # results
        "result.cosine": "Cosine",
        "result.match": "Match",
        "result.rank": "Rank {rank}",
        "meaning.softmax": "Match probability: the model's softmax over all {total} candidates. It says how far a "
        "result stands out from the others, not whether it is right. Bars show the cosine, relative to the best.",
        "meaning.sigmoid": "Match probability: the model's own estimate for this pair alone, whatever the other "
        "candidates. Bars show the cosine, relative to the best.",
        # worked examples
        "example.query.cat": "a cat with green eyes",
        "example.query.coffee": "a cup of coffee on a wooden table",
        "example.query.motorcycle": "a red motorcycle in a garage",
        "example.query.lion": "a lion resting on a rock",
        "example.query.cheetah-running": "a cheetah running at full speed",
        "example.query.horse": "the silhouette of a horse",
        "example.any.1": "a dog",
        "example.any.2": "people at a table",
        "example.any.3": "a street in the city",
        "example.any.4": "mountains and water",
        # errors
        "error.image.empty": "The file is empty; choose one with a picture in it.",
        "error.image.not_an_image": "This file is not a picture; choose a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF "
        "file.",
        "error.image.truncated": "The picture is damaged or cut off; copy or download it again.",
        "error.image.too_large": "The picture has more than {limit} megapixels; make it smaller.",
        "error.image.too_narrow": "One side of the picture is more than {limit} times the other; crop it.",
        "error.image.unsupported": "{kind} cannot be read here; save the picture as JPEG or PNG.",
        "error.image.missing": "The file cannot be opened; choose it again.",
        "error.caption.empty": "The caption is empty; type a few words.",
        "error.caption.too_long": "The caption has {length} characters and the limit is {limit}; shorten it.",
        "error.captions.none": "There is no caption; type one a line.",
        "error.captions.too_many": "There are {count} captions and the limit is {limit}; remove some.",
        "error.photo.duplicate": "This picture is there already.",
        "error.photo.limit": "There is room for {limit} pictures only.",
        "error.photos.none": "There is no picture yet; add one first.",
        "error.upload.size": "The file has more than {limit} MB; make it smaller.",
        "error.upload.lost": "The file did not arrive; try again.",
        "error.internal": "That did not work, and it is not your fault; try again.",
    },
    "zh": {
        "title": "图文对齐",
        "tagline": "以图寻句，以句寻图。",
        "language": "语言",
        "footer.model": "模型 {model} · 图库含 {pictures} 张图片和 {captions} 条描述",
        "footer.private": "您放入的内容只在内存中读取，仅供本次访问使用，不作保留。",
        "footer.api": "接口",
        "captions.tab": "以图找描述",
        "captions.results": "合适的描述",
        "captions.count": "{total} 条描述中最合适的 {count} 条",
        "captions.none": "这个图库没有描述。您可以在“相似度矩阵”中为自己写的描述打分。",
        "captions.example": "或者试试这些图片",
        "pictures.tab": "以描述找图",
        "pictures.query": "描述",
        "pictures.placeholder": "用中文或英文描述一张图片",
        "pictures.search": "搜索",
        "pictures.results": "合适的图片",
        "pictures.count": "{total} 张图片中最合适的 {count} 张",
        "pictures.none": "这个图库没有图片。您可以在“我的照片”中搜索自己的照片。",
        "pictures.example": "试试",
        "matrix.tab": "相似度矩阵",
        "matrix.pictures": "图片",
        "matrix.captions": "描述，每行一条",
        "matrix.compare": "比较",
        "matrix.sample": "这些是示例图片，添加您自己的图片后即被替换。",
        "matrix.clear": "清空图片",
        "matrix.view": "数值",
        "matrix.view.cosine": "余弦",
        "matrix.view.captions": "对描述做 softmax",
        "matrix.view.pictures": "对图片做 softmax",
        "matrix.meaning.cosine": "图片与描述的接近程度，从 -1 到 1。请只在本表内比较。",
        "matrix.meaning.captions": "各条描述竞争同一张图片：每一列相加为 100 %。",
        "matrix.meaning.pictures": "各张图片竞争同一条描述：每一行相加为 100 %。",
        "matrix.table": "{captions} 条描述（行）与 {pictures} 张图片（列）的相似度",
        "matrix.best_picture": "最合适这条描述的图片",
        "matrix.best_caption": "最合适这张图片的描述",
        "matrix.remove": "移除 {name}",
        "matrix.empty": "添加图片并输入描述，即可比较。",
        "matrix.head": "描述",
        "photos.tab": "我的照片",
        "photos.query": "描述",
        "photos.search": "搜索我的照片",
        "photos.clear": "清空我的照片",
        "photos.sample": "这是一组示例。放入您自己的照片后，示例就会让位。",
        "photos.own.one": "1 张照片，只在本次访问期间留在内存中；清空或离开后即消失。",
        "photos.own": "{count} 张照片，只在本次访问期间留在内存中；清空或离开后即消失。",
        "photos.cleared": "您的照片已清除。",
        "photos.results": "合适的照片",
        "photos.count": "{total} 张照片中最合适的 {count} 张",
        "drop.one": "选择一张图片",
        "drop.other": "换一张图片",
        "drop.many": "添加图片",
        "drop.photos": "添加照片，最多 {limit} 张",
        "drop.how": "也可以拖放到这里，或直接粘贴",
        "drop.how.many": "也可以拖放到这里，或直接粘贴",
        "drop.busy": "正在读取……",
        "drop.uploading": "正在上传第 {done} 个，共 {total} 个……",
        "drop.reading": "正在读取第 {done} 个，共 {total} 个……",
        "drop.preview": "您的图片：{name}",
        "drop.added.one": "已添加 1 张图片。",
        "drop.added": "已添加 {count} 张图片。",
        "drop.skipped.one": "有 1 个文件未能采用：",
        "drop.skipped": "有 {count} 个文件未能采用：",
        "drop.more": "另有 {count} 个",
        "result.cosine": "余弦",
        "result.match": "匹配",
        "result.rank": "第 {rank} 名",
        "meaning.softmax": "匹配概率：模型在全部 {total} 个候选上的 softmax，"
        "表示一个结果比其他候选突出多少，并不说明它是否正确。条形表示余弦，以最佳结果为满格。",
        "meaning.sigmoid": "匹配概率：模型对这一对图文的单独估计，与其他候选无关。条形表示余弦，以最佳结果为满格。",
        "example.query.cat": "一只绿眼睛的猫",
        "example.query.coffee": "木桌上的一杯咖啡",
        "example.query.motorcycle": "车库里的红色摩托车",
        "example.query.lion": "趴在岩石上的狮子",
        "example.query.cheetah-running": "飞奔的猎豹",
        "example.query.horse": "一匹马的剪影",
        "example.any.1": "一只狗",
        "example.any.2": "坐在桌边的人们",
        "example.any.3": "城市街道",
        "example.any.4": "山和水",
        "error.image.empty": "文件是空的，请选择一个含有图片的文件。",
        "error.image.not_an_image": "这个文件不是图片，请选择 JPEG、PNG、WebP、GIF、BMP、TIFF 或 AVIF 文件。",
        "error.image.truncated": "图片已损坏或不完整，请重新复制或下载。",
        "error.image.too_large": "图片超过 {limit} 百万像素，请先缩小。",
        "error.image.too_narrow": "图片的一边超过另一边的 {limit} 倍，请先裁剪。",
        "error.image.unsupported": "这里无法读取 {kind}，请将图片另存为 JPEG 或 PNG。",
        "error.image.missing": "文件无法打开，请重新选择。",
        "error.caption.empty": "描述是空的，请输入几个字。",
        "error.caption.too_long": "描述有 {length} 个字符，上限为 {limit}，请缩短。",
        "error.captions.none": "还没有描述，请每行输入一条。",
        "error.captions.too_many": "共有 {count} 条描述，上限为 {limit}，请删去一些。",
        "error.photo.duplicate": "这张图片已经在其中了。",
        "error.photo.limit": "最多只能放 {limit} 张图片。",
        "error.photos.none": "还没有图片，请先添加。",
        "error.upload.size": "文件超过 {limit} MB，请先缩小。",
        "error.upload.lost": "文件没有送达，请重试。",
        "error.internal": "出了点问题，不是您的操作造成的，请再试一次。",
    },
}


def text(lang: str, key: str, **values: object) -> str:
    """Say it in this language; `values` fill the placeholders.

    Raises:
        KeyError: on an unknown key.
    """
    return STRINGS[lang][key].format(**values)


def count_text(lang: str, key: str, count: int) -> str:
    """Say how many, with the singular where it differs."""
    return text(lang, f"{key}.one" if count == 1 else key, count=count)


def error_text(lang: str, error: InputError) -> str:
    """Say what is wrong in this language; an error that has no translation yet speaks English."""
    template = STRINGS[lang].get(f"error.{error.code}")
    values = dict(error.values)
    if lang == "zh" and "kind" in values:  # "HEIC files"
        name, files, _ = str(values["kind"]).rpartition(" files")
        values["kind"] = f"{name} 文件" if files else "这种图片"
    try:
        return template.format(**values) if template else str(error)
    except (KeyError, IndexError):
        return str(error)


def pick_language(query: Mapping[str, str], accept_language: str, default: str = DEFAULT_LANGUAGE) -> str:
    """Choose the page's language: `?lang=zh`, else the first of the browser's that we speak, else the default."""
    wanted = [query.get("lang", "")]
    ranked = []
    for place, part in enumerate(accept_language.split(",")):
        tag, _, weight = part.partition(";q=")
        try:
            ranked.append((-float(weight or 1), place, tag.strip()))
        except ValueError:
            continue
    wanted += [tag for weight, _, tag in sorted(ranked) if weight < 0]
    for tag in wanted:
        short = tag.lower().replace("_", "-").split("-")[0]
        if short in STRINGS:
            return short
    return default
