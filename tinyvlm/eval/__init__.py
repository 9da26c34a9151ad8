"""Scores and the stage that collects answers: captions (BLEU), questions (accuracy with chance lines), reports."""
