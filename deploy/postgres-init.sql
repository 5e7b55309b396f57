-- Run once, on an empty volume: the database of the tables to tag, and the user that owns it.
\getenv password TAGGER_DB_PASSWORD
CREATE ROLE tagger LOGIN PASSWORD :'password';
CREATE DATABASE tagger OWNER tagger;
REVOKE CONNECT ON DATABASE airflow FROM PUBLIC;
