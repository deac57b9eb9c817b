# docker build -t genkit .                              for CPUs
# docker build -t genkit --build-arg TORCH=cu128 .      for NVIDIA GPUs: any folder of download.pytorch.org/whl with our torch
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH}
ARG EXTRAS=serve,jxl,control
RUN python -m venv /opt/genkit
ENV PATH=/opt/genkit/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" -c constraints.txt torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY schedulers schedulers
COPY training training
COPY genkit genkit
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

FROM python:${PYTHON}-slim
# The home is the volume, so that caches of the hub, of kernels and of compiled graphs outlive the container
RUN useradd --uid 1000 --home-dir /data genkit && install -d -o genkit -g genkit /data /data/runs /models
COPY --from=build /opt/genkit /opt/genkit
# Without NVIDIA's base image these are what makes its container toolkit hand in the driver
ENV PATH=/opt/genkit/bin:$PATH HOME=/data PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /data
VOLUME /data
EXPOSE 7860
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 7860, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
# Beyond this container only with a key: -e GENKIT_API_KEY, --api-key-file, or --no-key if anyone may draw
ENTRYPOINT ["genkit"]
CMD ["serve", "--host", "0.0.0.0", "--runs", "/data/runs"]
