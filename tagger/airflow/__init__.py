"""The Airflow side: DAGs whose tasks call the steps. Light to import, for DAG files are parsed often."""
