# Images of Dify's programs as the kit's source mode has built them; the context is its cache. Paths, users and commands
# are those of upstream's images, which compose mode's settings count on.
ARG BASE
FROM ${BASE} AS base
ENV TZ=UTC LANG=C.UTF-8 LC_ALL=C.UTF-8 PYTHONIOENCODING=utf-8

# What the kit builds the web server's image on.
FROM base AS node
ARG NODE
ADD downloads/${NODE} /opt/node
RUN ln -s /opt/node/package/bin/node /usr/local/bin/node

# docker/local.dockerfile of the plugin daemon
FROM base AS plugin-daemon
ARG PART
# What pip and uv here know of this machine's certificates is for builds: who runs the container has to say it.
RUN pip install --no-cache-dir uv==0.8.9 && rm -f /etc/pip.conf /etc/uv/uv.toml
COPY builds/${PART}/server /app/main
COPY builds/${PART}/commandline /app/commandline
WORKDIR /app
ENV UV_PATH=/usr/local/bin/uv PLATFORM=local GIN_MODE=release TIKTOKEN_CACHE_DIR=/app/.tiktoken
ENTRYPOINT ["/usr/bin/tini", "-g", "--"]
CMD ["/bin/bash", "-c", "/app/commandline migrate && exec /app/main"]

# docker/templates/production.dockerfile of the sandbox, whose list of system calls is for this Node
FROM base AS sandbox
ARG PART
COPY builds/${PART}/venv/lib/python3.12/site-packages /usr/local/lib/python3.12/site-packages
COPY builds/${PART}/node /usr/local/bin/node
COPY builds/${PART}/main /main
RUN mkdir -p /conf /dependencies && touch /dependencies/python-requirements.txt
ENV PYTHON_PATH=/usr/local/bin/python3.12
ENV PYTHON_LIB_PATH=/usr/local/lib/python3.12,/usr/local/lib/libpython3.12.so.1.0,/usr/lib/x86_64-linux-gnu,/lib/x86_64-linux-gnu,/lib64,/etc/ssl/certs/ca-certificates.crt,/etc/nsswitch.conf,/etc/hosts,/etc/resolv.conf
ENTRYPOINT ["/main"]

# dify-agent/Dockerfile
FROM base AS agent-backend
ARG PART
RUN useradd -r -u 1001 -U dify && mkdir -p /app/api/storage && chown -R dify: /app
COPY --chown=1001:1001 builds/${PART}/.venv /app/api/.venv
RUN ln -sfn /usr/local/bin/python3.12 /app/api/.venv/bin/python && sed -i 's|^home = .*|home = /usr/local/bin|' /app/api/.venv/pyvenv.cfg
WORKDIR /app/api
ENV VIRTUAL_ENV=/app/api/.venv PATH=/app/api/.venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
EXPOSE 5050
USER dify
CMD ["uvicorn", "dify_agent.server.app:app", "--host", "0.0.0.0", "--port", "5050"]

# dify-agent-runtime/docker/Dockerfile
FROM base AS agent-runtime
ARG PART
RUN apt-get -q update && apt-get -q install -y --no-install-recommends git jq procps ripgrep tmux unzip \
    && rm -rf /var/lib/apt/lists/*
COPY builds/${PART}/dify-agent builds/${PART}/shellctl* /usr/local/bin/
RUN useradd --create-home --shell /bin/sh dify && mkdir -p /mnt/drive && chown -R dify: /home /mnt/drive
USER dify
WORKDIR /home/dify
EXPOSE 5004
CMD ["shellctl", "serve", "--listen", "0.0.0.0:5004"]
