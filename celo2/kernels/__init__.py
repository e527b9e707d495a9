"""The rule's passes, Newton–Schulz and the last step as Triton kernels; `celo2.backend` chooses them on CUDA.

Each stands beside a plain function that it must equal: `passes` beside `celo2.blocked`, `symmetric` beside
`celo2.orthogonalize`. `device` is the code that runs on the GPU for `passes`, `traffic` counts its bytes.
"""
