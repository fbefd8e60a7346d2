"""Token mixers in pretrained Vision Transformers: what replacing attention costs, saves, and how much can be recovered.

The notebooks tell the story; this package holds what they share. `backbone.create` makes a timm ViT with any mixer,
`perceptual.load` gives the metric, `results.read` the rows behind every table and figure.
"""

__version__ = "1.0.0"
