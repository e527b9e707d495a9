"""Parameters over several ranks: which part a rank holds, which rank does what, and all communication."""
