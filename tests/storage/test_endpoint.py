import os
import pickle

import pytest

from ns.core.errors import StoreError
from ns.storage import open_store
from ns.storage.endpoint import EnvironmentCredentials, FileCredentials, S3Endpoint
from ns.storage.s3 import S3Store


def test_endpoint_and_region_come_from_the_environment():
    plain = S3Endpoint.from_environment({})
    assert (plain.url, plain.region, plain.secrets) == ("https://s3.amazonaws.com", "us-east-1", None)
    both = {"AWS_ENDPOINT_URL": "http://a:1", "AWS_ENDPOINT_URL_S3": "http://b:2/", "AWS_DEFAULT_REGION": "eu-1"}
    assert S3Endpoint.from_environment(both).url == "http://b:2"
    assert S3Endpoint.from_environment(both).region == "eu-1"
    assert S3Endpoint.from_environment({**both, "AWS_REGION": "eu-2"}).region == "eu-2"
    assert S3Endpoint.from_environment({"NS_S3_SECRETS": "/s"}).secrets == "/s"


def test_keys_in_the_environment_count_where_the_folder_of_secrets_is_empty(tmp_path):
    environment = {"NS_S3_SECRETS": str(tmp_path), "AWS_ACCESS_KEY_ID": "key"}
    assert S3Endpoint.from_environment(environment).secrets is None
    (tmp_path / "accesskey").write_text("x")
    assert S3Endpoint.from_environment(environment).secrets == str(tmp_path)


@pytest.mark.parametrize(
    "url", ["localhost:9000", "ftp://a", "http://", "http://a/path", "http://a?x=1", "http://a:port", "http://[::1"]
)
def test_invalid_endpoint_is_refused(url):
    with pytest.raises(StoreError, match=r"no S3 endpoint; set AWS_ENDPOINT_URL to http\(s\)://HOST\[:PORT\]"):
        S3Endpoint.from_environment({"AWS_ENDPOINT_URL": url})


@pytest.mark.parametrize("url", ["http://key:hidden@host", "http://key:hidden@host:port", "key:hidden@host"])
def test_endpoint_with_credentials_is_refused_without_quoting_them(url):
    with pytest.raises(StoreError) as caught:
        S3Endpoint.from_environment({"AWS_ENDPOINT_URL": url})
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://key:hidden@bucket/p", "s3://hidden@bucket"])
def test_uri_with_credentials_is_refused_without_quoting_them(uri):
    with pytest.raises(StoreError, match="no credentials belong into a URI; set AWS_ACCESS_KEY_ID") as caught:
        open_store(uri)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://Bucket/x", "s3://b", "s3://a_b/x", "s3://bucket?x/y"])
def test_invalid_bucket_is_refused(uri):
    with pytest.raises(StoreError, match="must be s3://BUCKET/PREFIX"):
        open_store(uri)


def test_s3_uri_is_normalized():
    assert open_store("s3://bucket").uri == "s3://bucket"
    assert open_store("s3://bucket/").uri == "s3://bucket"
    assert open_store("s3://bucket/a//b?c#d%20/").uri == "s3://bucket/a/b?c#d%20"
    assert open_store("s3://bucket/a").at("b").uri == "s3://bucket/a/b"
    assert open_store("s3://bucket/a").at("s3://other/c").uri == "s3://other/c"
    assert open_store("s3://bucket/a").at("/x").uri == "file:///x"
    with pytest.raises(StoreError, match="not a key"):
        open_store("s3://bucket/a/../b")


def test_missing_ca_file_is_named():
    with pytest.raises(StoreError, match=r"AWS_CA_BUNDLE=/nope: no such file; set it to a file of CA certificates"):
        S3Endpoint.from_environment({"AWS_CA_BUNDLE": "/nope"})
    assert os.path.isfile(S3Endpoint.from_environment({}).ca_file)  # noqa: PTH113


def test_session_token_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    assert EnvironmentCredentials().retrieve().session_token == "token"


def test_invalid_region_is_explained(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "no region!")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"s3://bucket/k: cannot read: .*invalid region no region!.*AWS_REGION"):
        open_store("s3://bucket").get("k")


def mount(folder, access, secret):
    """As the kubelet does: files are links into a folder that is swapped at once."""
    data = folder / f"..{access}"
    data.mkdir(parents=True)
    (data / "accesskey").write_text(access)
    (data / "secretkey").write_text(secret + "\n")
    (folder / "..data_tmp").symlink_to(data.name)
    (folder / "..data_tmp").rename(folder / "..data")
    for name in ("accesskey", "secretkey"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")


def test_secret_files_are_read_again_after_rotation(tmp_path):
    mount(tmp_path, "key-1", "secret-1")
    credentials = FileCredentials(tmp_path)
    first = credentials.retrieve()
    assert (first.access_key, first.secret_key, first.session_token) == ("key-1", "secret-1", None)
    assert credentials.retrieve() is first
    mount(tmp_path, "key-2", "secret-2")
    second = credentials.retrieve()
    assert (second.access_key, second.secret_key) == ("key-2", "secret-2")


def test_missing_or_empty_secret_file_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"no credentials: .*/accesskey: No such file or directory; NS_S3_SECRETS must name"):
        FileCredentials(tmp_path).retrieve()
    (tmp_path / "accesskey").write_text("x")
    (tmp_path / "secretkey").write_text("\n")
    with pytest.raises(StoreError, match=r"no credentials: .*/secretkey: is empty; write the key into it"):
        FileCredentials(tmp_path).retrieve()


@pytest.mark.integration
def test_pickled_store_holds_no_secret(monkeypatch, moto):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    store = open_store("s3://bucket")
    assert isinstance(store, S3Store)
    assert store.service.client
    assert b"hidden" not in pickle.dumps(store)
    assert "hidden" not in repr(vars(store)) + repr(vars(store.service))
