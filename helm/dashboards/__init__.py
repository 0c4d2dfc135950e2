"""The Grafana dashboards of chart and compose, as tables of panels; python -m helm.dashboards writes the JSON."""
