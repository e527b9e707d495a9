"""What a training run is: its data and model, its folder and state, evaluation and the summary at its end."""
