"""The checkpoint format. All code that writes, checks, reads or converts checkpoints is in this package.

    checkpoints/step_00000100/
        model.safetensors       weights by parameter name, a tied weight once
        optimizer.safetensors   optimizer state as `<parameter name>/<state name>`, in its own dtype
        config.json             the transformers configuration of the model
        state.json              step, tokens, seconds, the configuration of the training run, the data set
        manifest.json           size and sha256 of every file above; written last

If N ranks wrote it together, the tensors are divided over files with Hugging Face's names, and an index says which file holds
which tensor: `model-00001-of-0000N.safetensors` and `model.safetensors.index.json`, and the same for the optimizer.

A checkpoint holds whole tensors by name, so any number of processes and any strategy can read it. It contains no pickle. It is
written to a temporary folder, flushed to disk and renamed; only then are older checkpoints deleted. A folder with another name
(such as a copy), or without a matching manifest, is not a checkpoint.

    snapshot.py   copy a rank's part to memory     load.py        load into a strategy, or as a model
    writer.py     write one file                   tensors.py     read tensors of one file or of several
    save.py       when to save, on all ranks       verify.py      which checkpoints are whole
    publish.py    the first rank's part            retention.py   which checkpoints are deleted
    folders.py    where a run's checkpoints are    journal.py     which checkpoints a run wrote
"""
