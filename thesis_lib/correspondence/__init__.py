"""Semantic correspondence: find the same part of another thing of the same kind, by the features of frozen models.

matching and pck say how a match is made and counted; features, diffusion, hyperfeatures and prompts where features come
from; cache keeps them; systems names the published ones; students, objectives and training make new ones from these.
"""
