"""The checkpoint format. Everything that writes, checks, reads or converts a checkpoint is in this package.

    checkpoints/step_00000100/
        model.safetensors       weights by parameter name, a tied weight once
        optimizer.safetensors   optimizer state as `<parameter name>/<state name>`, in its own dtype
        config.json             the transformers configuration of the model
        state.json              step, tokens, seconds, the configuration of the training run, the data set
        manifest.json           size and sha256 of every file above; written last

A checkpoint holds whole tensors by name, so any number of processes and any strategy can read it. There is no pickle in it. It
is written to a temporary folder, flushed to disk and renamed; only then are older ones deleted. A folder under another name, as
a copy, or without a manifest that fits, is no checkpoint.
"""
