"""Evaluation of rules on networks and data that they were not meta-trained on."""
