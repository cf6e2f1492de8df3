"""Floor 4, the making of the compact model: `python -m alignment.compact --data FLICKR8K --out checkpoints/compact`.

Place in the flow: two pretrained towers that pip can install are converted (`convert`), their frozen features computed
once (`features`), and heads and last blocks trained contrastively on captioned photographs (`recipe`). Nothing of it is
needed to use the model.
"""
