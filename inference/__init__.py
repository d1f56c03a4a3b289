"""The model service: which models there are, where their weights come from, how the engine is started and proved.

Runs on the host as ``python -m inference`` with the engine's own interpreter. Standard library and PyYAML only, but for
what needs the engine itself, which is imported where it is used.
"""
