"""Networks and data that no rule was meta-trained on, to find out how good a rule is."""
