"""The measures as metrics of Hugging Face's `evaluate`, each in a folder that `evaluate.load` takes.

`evaluate` writes what it is given to an Arrow file, and hands all of it out at once when the result is asked for. So
maps are stored as PNG, a few kilobytes each, and decoded one after the other.
"""
