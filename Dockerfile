# docker build -t celo2 .      docs/docker.md has the commands that use it
FROM python:3.11-slim
# g++ for torch.compile, gcc for Triton's launchers
RUN apt-get update && apt-get install -y --no-install-recommends g++ gcc && rm -rf /var/lib/apt/lists/*
WORKDIR /project
# the packages first: they change seldom
ARG INDEX=https://pypi.org/simple
COPY requirements.txt .
RUN python -m pip install --no-cache-dir --extra-index-url "$INDEX" -r requirements.txt
COPY . .
RUN python train.py --help > /dev/null
CMD ["python", "train.py", "--help"]
