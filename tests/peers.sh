#!/usr/bin/env bash
# Builds the other programs that Warren is tested with and measured against, outside the tree:
#
#     tests/peers.sh              build what is missing, print the folder
#     tests/peers.sh bench        build Flannel's userspace back end too, which only bench/run needs
#     tests/peers.sh kube-proxy   build kube-proxy too, which only bench/kube-proxy needs
#     tests/peers.sh deploy       build helm and kustomize too, which render the manifests for the section `deploy`
#     tests/peers.sh --path       print the folder only
#
# Needs cargo, a C compiler, and go (an old one fetches a new one, see tests/go); kube-proxy downloads about 0.4 GB of
# Go modules. Kernel VXLAN needs nothing; the kernel's WireGuard is not used, because wireguard-go is the reference and
# many kernels (the reason for Warren) have no module.
set -euo pipefail

# The versions that the results in bench/results and the interop tests stand for.
wireguard_go=v0.0.0-20260522210424-ecfc5a8d5446
boringtun=0.7.1
gotatun=0.10.2
cni_plugins=v1.9.1 # before, CHECK of `bandwidth` crashes for a pod without a limit
cnitool=v1.3.0
kube_proxy=1.36.3
flannel=v0.28.10
helm=v3.22.0
kustomize=v5.7.1

tests=$(cd "$(dirname "$0")" && pwd)
cache=${WARREN_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/warren-peers}
bin=$cache/bin
if [[ ${1:-} == --path ]]; then
    echo "$bin"
    exit
fi
mkdir -p "$bin"

# One version file per program: a changed version above rebuilds it.
fresh() { [[ -x $bin/$1 && $(cat "$cache/$1.version" 2>/dev/null) == "$2" ]]; }
built() { echo "$2" >"$cache/$1.version"; }
need() {
    command -v "$1" >/dev/null || { echo "peers.sh: $1 is needed to build $2" >&2; exit 1; }
    [[ $1 == go ]] || return 0
    PATH=$("$tests/go"):$PATH
    unset GOROOT
}

if ! fresh wireguard-go "$wireguard_go"; then
    need go wireguard-go
    # GOFLAGS= : flags meant for another tree must not change what is measured.
    GOFLAGS='' GOBIN=$cache/go nice go install "golang.zx2c4.com/wireguard@$wireguard_go" >&2
    mv "$cache/go/wireguard" "$bin/wireguard-go"
    built wireguard-go "$wireguard_go"
fi

# The CNI plugins beside which warren-cni stands, in a folder of their own as a runtime has them, and libcni's tool.
if ! fresh cni/bridge "$cni_plugins"; then
    need go "the CNI plugins"
    mkdir -p "$bin/cni" "$cache/cni"
    for plugin in main/bridge main/ptp main/loopback ipam/host-local meta/portmap meta/bandwidth; do
        GOFLAGS='' CGO_ENABLED=0 GOBIN=$bin/cni nice \
            go install -trimpath -ldflags "-s -w" "github.com/containernetworking/plugins/plugins/$plugin@$cni_plugins" >&2
    done
    built cni/bridge "$cni_plugins"
fi
if ! fresh cnitool "$cnitool"; then
    need go cnitool
    GOFLAGS='' CGO_ENABLED=0 GOBIN=$bin nice go install -trimpath "github.com/containernetworking/cni/cnitool@$cnitool" >&2
    built cnitool "$cnitool"
fi

# PACKAGE VERSION BINARY
crate() {
    fresh "$3" "$2" && return
    need cargo "$3"
    CARGO_TARGET_DIR=$cache/target nice cargo install --quiet --locked --force \
        --root "$cache" --version "$2" "$1" >&2
    built "$3" "$2"
}
crate boringtun-cli "$boringtun" boringtun-cli
crate gotatun-cli "$gotatun" gotatun

# kubernetes names the libraries of its own tree by folder ("replace k8s.io/api => ./staging/..."), which
# `go install` of another module refuses: a module of our own names their published versions instead.
kube_proxy() {
    fresh kube-proxy "$kube_proxy" && return
    need go kube-proxy
    local folder=$cache/kube-proxy own library
    rm -rf "$folder"
    mkdir -p "$folder"
    cd "$folder"
    export GOFLAGS=''
    go mod init warren-peers >&2
    own=$(go mod download -json "k8s.io/kubernetes@v$kube_proxy" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
    {
        echo "require k8s.io/kubernetes v$kube_proxy"
        sed -n 's|^\t\(k8s.io/[a-z-]*\) => ./staging/.*|\1|p' "$own" | while read -r library; do
            echo "replace $library => $library v0.${kube_proxy#1.}"
        done
    } >>go.mod
    # Linked as upstream links its releases, and with its version, which kube-proxy writes in its log.
    CGO_ENABLED=0 nice go build -mod=mod -trimpath -o "$bin/kube-proxy" \
        -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=v$kube_proxy" \
        k8s.io/kubernetes/cmd/kube-proxy >&2
    built kube-proxy "$kube_proxy"
}
if [[ ${1:-} == kube-proxy ]]; then
    (kube_proxy)
fi

# flanneld starts only with etcd or Kubernetes behind it: a main of ours gives its back end `udp` the leases.
flannel_udp() {
    local source=$1 folder=$cache/flannel-udp version
    version="$flannel $(cksum <"$source")"
    fresh flannel-udp "$version" && return
    need go flannel-udp
    need cc flannel-udp
    rm -rf "$folder"
    mkdir -p "$folder"
    cp "$source" "$folder/main.go"
    cd "$folder"
    export GOFLAGS=''
    go mod init warren-peers >&2
    echo "require github.com/flannel-io/flannel $flannel" >>go.mod
    CGO_ENABLED=1 nice go build -mod=mod -trimpath -o "$bin/flannel-udp" . >&2
    built flannel-udp "$version"
}
if [[ ${1:-} == bench ]]; then
    (flannel_udp "$(realpath "$(dirname "$0")")/../bench/flannel_udp.go")
fi

# MODULE VERSION BINARY
go_program() {
    fresh "$3" "$2" && return
    need go "$3"
    GOFLAGS='' GOBIN=$cache/go CGO_ENABLED=0 nice go install -trimpath -ldflags "-s -w" "$1@$2" >&2
    mv "$cache/go/$3" "$bin/$3"
    built "$3" "$2"
}
if [[ ${1:-} == deploy ]]; then
    go_program helm.sh/helm/v3/cmd/helm "$helm" helm
    go_program sigs.k8s.io/kustomize/kustomize/v5 "$kustomize" kustomize
fi

echo "$bin"
