"""The published command lines and files: PatchCore's, SimpleNet's, EfficientAD's and PUAD's.

One file a system turns its flags into our configs; `models` reads and writes its files. No method is computed here.
"""
