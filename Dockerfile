# Two images from the locks:
#   docker build --tag tagger .                        Airflow with tagger: every Airflow service of docker-compose.yaml
#   docker build --tag tagger-tag --target tag .       the `tagger` command alone, without Airflow
FROM python:3.12.14-slim-bookworm AS python
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --uid 50000 --gid 0 --create-home tagger

# uv, which is in the lock itself, and the package's wheel, built with the lock's hatchling
FROM python AS build
ENV UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never VIRTUAL_ENV=/opt/venv
WORKDIR /src
COPY requirements-dev.txt ./
RUN sed -n '/^uv==/,/[^\\]$/p' requirements-dev.txt >uv.txt \
    && pip install --no-cache-dir --no-deps --require-hashes --requirement uv.txt \
    && uv venv /opt/venv

FROM build AS wheel
COPY pyproject.toml README.md ./
COPY tagger tagger
RUN uv build --wheel --require-hashes --build-constraints requirements-dev.txt --out-dir /wheel

FROM build AS tag-build
COPY requirements-tag.txt ./
RUN uv pip sync --require-hashes requirements-tag.txt
COPY --from=wheel /wheel /wheel
RUN uv pip install --no-deps /wheel/*.whl

FROM build AS airflow-build
COPY requirements.txt ./
RUN uv pip sync --require-hashes requirements.txt
COPY --from=wheel /wheel /wheel
RUN uv pip install --no-deps /wheel/*.whl

FROM python AS tag
COPY --from=tag-build /opt/venv /opt/venv
USER 50000
WORKDIR /home/tagger
ENTRYPOINT ["tagger"]

FROM python AS airflow
ENV AIRFLOW_HOME=/opt/airflow
COPY --from=airflow-build /opt/venv /opt/venv
# a new volume for the logs takes its owner from this folder
RUN install --directory --owner=tagger --group=0 /opt/airflow /opt/airflow/logs
WORKDIR /opt/airflow
COPY deploy/api-server.sh ./
COPY plugins plugins
COPY dags dags
USER 50000
CMD ["airflow", "version"]
