"""The service on one machine: what docker-compose.yml comes to, for every choice of profiles."""

import itertools
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.settings import Settings
from tests.deploy.compose import PROFILES, SECRETS, read, run
from tests.deploy.dockerfile import ROOT, stages

ALWAYS = {"postgres", "redis", "migrate", "api", "reaper"}
ADDED = {"gpu": {"worker-gpu"}, "cpu": {"worker-cpu"}, "monitoring": {"metrics-key", "prometheus", "grafana"}}
ADDED |= {"generator": {"generator"}}
# They end.
ONCE = {"migrate", "metrics-key"}
WORKERS = {"worker-gpu", "worker-cpu"}
OURS = {"migrate", "api", "reaper", "metrics-key"} | WORKERS
EXAMPLE = ROOT / ".env.example"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(read(*PROFILES)["services"])


CHOICES = [choice for size in range(len(PROFILES) + 1) for choice in itertools.combinations(PROFILES, size)]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "+".join(choice) or "none")
def test_a_profile_adds_its_services_and_no_others(choice: tuple[str, ...]) -> None:
    assert read(*choice)["services"].keys() == ALWAYS.union(*(ADDED[profile] for profile in choice))


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_a_secret_that_is_not_given_is_asked_for(secret: str, empty: bool) -> None:
    done = run(
        settings={name: value for name, value in SECRETS.items() if name != secret} | ({secret: ""} if empty else {})
    )
    assert done.stdout == ""
    assert f"{secret} is missing a value: set it in .env, see .env.example" in done.stderr


def test_the_example_explains_every_variable_and_no_other() -> None:
    wanted = set(re.findall(r"(?<!\$)\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    assert set(re.findall(r"^#?([A-Z_]+)=", EXAMPLE.read_text(), re.MULTILINE)) == wanted | {"COMPOSE_PROFILES"}


def test_the_example_s_own_command_makes_an_env_file_that_works(tmp_path: Path) -> None:
    [command] = re.findall(r"^#   (while .*)$", EXAMPLE.read_text(), re.MULTILINE)
    (tmp_path / ".env.example").write_bytes(EXAMPLE.read_bytes())
    subprocess.run(["sh", "-euc", command], cwd=tmp_path, check=True)
    made = dict(re.findall(r"^(\w+)=([0-9a-f]{48})$", (tmp_path / ".env").read_text(), re.MULTILINE))
    assert made.keys() == SECRETS.keys()
    assert len({*made.values()}) == len(made)
    done = run(*PROFILES, settings={}, file=tmp_path / ".env")
    assert done.returncode == 0, done.stderr
    assert f":{made['POSTGRES_PASSWORD']}@postgres:5432" in done.stdout


def test_nobody_has_rights_that_they_do_not_need(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"}, name
        assert "/tmp" in service["tmpfs"], name
        sources = [mount["source"] for mount in service.get("volumes", [])]
        assert not [source for source in sources if source.endswith(".sock")], name


def test_what_is_to_run_runs_again_and_says_whether_it_is_well(services: dict[str, Any]) -> None:
    inherited = {"api": "api", "worker-gpu": "trainer", "worker-cpu": "trainer"}
    targets = {service["image"]: service["build"]["target"] for service in services.values() if "build" in service}
    for name, service in services.items():
        if name in ONCE:
            assert service["restart"] == "no", name
            assert service["healthcheck"] == {"disable": True}, name
            continue
        assert service["restart"] == "unless-stopped", name
        if name in inherited:
            # Command and check are the image's.
            assert targets[service["image"]] == inherited[name]
            assert service["command"] is None and "healthcheck" not in service, name
            assert stages()[inherited[name]].all("HEALTHCHECK"), name
        else:
            assert service["healthcheck"]["test"], name


def test_each_image_is_built_once_and_who_has_no_build_does_not_pull_it(services: dict[str, Any]) -> None:
    """Builds of one name at once fail, on some engines, with "already exists"."""
    built = [service["image"] for service in services.values() if "build" in service]
    assert len(built) == len(set(built)) == 3
    for name in OURS:
        if "build" not in services[name]:
            assert services[name]["image"] in built
            assert services[name]["pull_policy"] == "never"
            assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"


def test_the_profiles_of_the_example_reach_every_command(tmp_path: Path) -> None:
    """`stop` and `down` pass over services whose profile is not chosen: so it is chosen for all commands."""
    [chosen] = re.findall(r"^COMPOSE_PROFILES=(.*)$", EXAMPLE.read_text(), re.MULTILINE)
    made = tmp_path / ".env"
    made.write_text(f"COMPOSE_PROFILES={chosen}\n")
    assert {"worker-gpu", "prometheus"} <= json.loads(run(settings=SECRETS, file=made).stdout)["services"].keys()


def test_logs_do_not_fill_the_disk(services: dict[str, Any]) -> None:
    assert all(service["logging"]["options"].keys() == {"max-size", "max-file"} for service in services.values())


def test_images_of_others_have_exact_versions(services: dict[str, Any]) -> None:
    for name in services.keys() - OURS:
        assert re.search(r":v?\d+\.\d+[\w.-]*$", services[name]["image"]), name


def test_nothing_is_reached_from_another_machine_unless_it_is_said(services: dict[str, Any]) -> None:
    published = {name: port for name, service in services.items() for port in service.get("ports", [])}
    assert published.keys() == {"api", "prometheus", "grafana"}
    assert {port["host_ip"] for port in published.values()} == {"127.0.0.1"}
    elsewhere = read(settings={"BIND_ADDRESS": "192.0.2.1"})["services"]["api"]["ports"]
    assert elsewhere[0]["host_ip"] == "192.0.2.1"


def test_the_databases_are_reached_by_the_service_alone() -> None:
    whole = read(*PROFILES)
    assert whole["networks"]["back"]["internal"] is True
    inside = {name for name, service in whole["services"].items() if "back" in service["networks"]}
    assert inside == OURS | {"postgres", "redis"}
    assert [name for name in ("postgres", "redis") if whole["services"][name]["networks"].keys() != {"back"}] == []


def test_metrics_of_jobs_are_not_open_to_whoever_reaches_the_api(services: dict[str, Any]) -> None:
    assert not any("STIEFEL_OPEN_METRICS" in service.get("environment", {}) for service in services.values())


def test_nothing_starts_before_the_tables_are_there(services: dict[str, Any]) -> None:
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    for name in OURS - {"migrate"}:
        assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully", name


def test_what_is_mounted_from_here_is_here(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for mount in service.get("volumes", []):
            if mount["type"] == "bind":
                assert Path(mount["source"]).is_relative_to(ROOT) and Path(mount["source"]).exists(), name
                assert mount["read_only"] is True, name


def test_whoever_needs_run_directories_has_the_same(services: dict[str, Any]) -> None:
    home = stages()["api"].environment["STIEFEL_HOME"]
    for name in {"api", "generator"} | WORKERS:
        mounts = {mount["target"]: mount["source"] for mount in services[name]["volumes"]}
        assert mounts[home] == "runs", name
        assert mounts["/data"] == "data", name


def test_a_directory_of_the_machine_can_take_the_place_of_a_volume() -> None:
    services = read("gpu", settings={"DATA": "/srv/data", "NVME": "/mnt/disk", "RUNS": "/mnt/shared"})["services"]
    mounts = {mount["target"]: mount for mount in services["worker-gpu"]["volumes"]}
    assert {mount["type"] for mount in mounts.values()} == {"bind"}
    sources = {at: mount["source"] for at, mount in mounts.items()}
    assert sources == {"/data": "/srv/data", "/nvme": "/mnt/disk", "/var/lib/stiefel": "/mnt/shared"}
    assert mounts["/data"]["read_only"] is True


def test_workers_may_be_of_a_service_on_another_machine() -> None:
    elsewhere = {"STIEFEL_DATABASE_URL": "postgresql+psycopg://a:b@c/d", "STIEFEL_REDIS_URL": "redis://:e@f/0"}
    environment = read("gpu", settings=elsewhere)["services"]["worker-gpu"]["environment"]
    assert {name: environment[name] for name in elsewhere} == elsewhere
    environment = read("gpu")["services"]["worker-gpu"]["environment"]
    assert environment["STIEFEL_REDIS_URL"] == f"redis://:{SECRETS['REDIS_PASSWORD']}@redis:6379/0"


def test_every_setting_that_is_given_is_one(services: dict[str, Any]) -> None:
    for name in OURS:
        environment: dict[str, str] = services[name]["environment"]
        ours = {key.removeprefix("STIEFEL_").lower(): value for key, value in environment.items() if "STIEFEL_" in key}
        assert ours.keys() <= Settings.model_fields.keys(), name
        # What is no value of its kind is refused here as in the container.
        Settings.model_validate(ours)


def test_programs_of_ours_are_there(services: dict[str, Any]) -> None:
    started = {
        name: services[name]["command"][2]
        for name in OURS
        if (services[name]["command"] or [""])[:2] == ["python", "-m"]
    }
    assert started == {"migrate": "migrations", "reaper": "jobs.reaper"}
    assert all(find_spec(module) for module in started.values())


def test_a_worker_may_finish_its_checkpoint(services: dict[str, Any]) -> None:
    for name in WORKERS:
        patience = services[name]["stop_grace_period"]
        [(minutes, seconds)] = re.findall(r"^(?:(\d+)m)?(\d+)s$", patience)
        grace = float(services[name]["environment"]["STIEFEL_GRACE_SECONDS"])
        assert 60 * int(minutes or 0) + int(seconds) >= grace + 20, name
        assert services[name]["ulimits"]["memlock"] == -1, name
        assert int(services[name]["shm_size"]) >= 2**30, name


def test_api_and_workers_have_the_store_of_files_and_its_credentials() -> None:
    url = {"STIEFEL_FILES_URL": "s3://bucket/files"}
    for name, service in read(*PROFILES, settings=url)["services"].items():
        given = service.get("environment", {}).get("STIEFEL_FILES_URL")
        assert given == (url["STIEFEL_FILES_URL"] if name in OURS else None), name
    written = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    read_by = {name: [file["path"] for file in one.get("env_file", [])] for name, one in written.items()}
    assert {name for name, paths in read_by.items() if "files.env" in paths} == WORKERS | {"api"}
    # Checkpoints may be in another store: trainers' own come later, and count.
    assert all(read_by[name] == ["files.env", "trainers.env"] for name in WORKERS)
    assert "files.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_gpus_are_reserved_and_chosen(services: dict[str, Any]) -> None:
    [device] = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"], device["count"]) == ("nvidia", ["gpu"], -1)
    chosen = read("gpu", settings={"GPU_COUNT": "2", "STIEFEL_GPUS": "0,1"})["services"]["worker-gpu"]
    assert chosen["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2
    assert chosen["environment"]["STIEFEL_GPUS"] == "0,1"
    assert "deploy" not in services["worker-cpu"]
    assert services["worker-cpu"]["environment"]["STIEFEL_GPUS"] == "none"


def test_the_generator_is_asked_by_the_api_alone_and_knows_nothing_of_the_service(services: dict[str, Any]) -> None:
    generator, api = services["generator"], services["api"]
    assert generator["networks"].keys() == {"front"} <= api["networks"].keys()
    assert "ports" not in generator
    secret = generator["environment"]["STIEFEL_GENERATOR_SECRET"]
    assert secret == api["environment"]["STIEFEL_GENERATOR_SECRET"] == SECRETS["GENERATOR_SECRET"]
    assert not [name for name in generator["environment"] if "URL" in name]
    assert generator["image"] == services["worker-cpu"]["image"]
    options = [word for word in generator["command"] if word.startswith("--")]
    done = subprocess.run([sys.executable, "-m", "trainer", "serve", "--help"], capture_output=True, text=True)
    assert not [option for option in options if option not in done.stdout]
    # Without the profile the API says how to start one.
    assert api["environment"]["STIEFEL_GENERATOR_URL"] == ""


def test_grafana_asks_the_prometheus_that_is_there(services: dict[str, Any]) -> None:
    provisioning = ROOT / "compose" / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0]['target']}"
    assert services["grafana"]["networks"].keys() & services["prometheus"]["networks"].keys()
    [provider] = yaml.safe_load((provisioning / "dashboards" / "stiefel.yml").read_text())["providers"]
    assert provider["options"]["path"] in {mount["target"] for mount in services["grafana"]["volumes"]}
