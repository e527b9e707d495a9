"""The checkpoint format. Everything that writes, checks, reads or converts a checkpoint is in this package.

    checkpoints/step_00000100/
        model.safetensors       weights by parameter name, a tied weight once
        optimizer.safetensors   optimizer state as `<parameter name>/<state name>`, in its own dtype
        config.json             the transformers configuration of the model
        state.json              step, tokens, seconds, the configuration of the training run, the data set
        manifest.json           size and sha256 of every file above; written last

Where N ranks wrote it together, the tensors lie in files as Hugging Face names them, with an index of which tensor is where:
`model-00001-of-0000N.safetensors` and `model.safetensors.index.json`, and the same for the optimizer.

A checkpoint holds whole tensors by name, so any number of processes and any strategy can read it. There is no pickle in it. It
is written to a temporary folder, flushed to disk and renamed; only then are older ones deleted. A folder under another name, as
a copy, or without a manifest that fits, is no checkpoint.

    snapshot.py   what of it is on a rank          load.py        into a strategy, or as a model
    writer.py     one file, tensor by tensor       tensors.py     tensors of one file or of several
    save.py       when, and all ranks together     verify.py      which are whole
    publish.py    the first rank's part            retention.py   which are deleted
"""
