"""Publishing: model cards, summaries, uploads and the folder of a Space."""
