# A host as an administrator hands it over: systemd, an SSH server, a Docker engine, and nothing of the kit.
ARG BASE
FROM ${BASE}
RUN apt-get -q update \
    && apt-get -q install -y --no-install-recommends dbus docker.io git iproute2 iptables libpam-systemd make \
        openssh-server procps systemd-sysv xz-utils \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*
STOPSIGNAL SIGRTMIN+3
CMD ["/sbin/init"]
